"""Sparse momentum: Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, and release 1.0; see `reference`.

At the end of every epoch but the last. All layers have the density at the start.
"""

from fractions import Fraction

from oracles import distributions, schedules
from oracles.network import Move, at_end_of_epochs, exactly, largest_remainders, none_empty
from oracles.reference import update as masks_after


def start(layers, course):
    total, sizes = exactly(layers, course), [layer.size for layer in layers]
    real = distributions.uniform([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    return largest_remainders(total, real, sizes)


def moves(step, course):
    return at_end_of_epochs(step, course)


def rate(step, course):
    return schedules.cosine(0.5, step, course.steps, lowest=0.005)


def update(layers, step, course):
    weights, momenta, masks = ([getattr(layer, part) for layer in layers] for part in ("weight", "momentum", "mask"))
    after = none_empty(
        masks_after(weights, momenta, masks, rate(step, course)), masks, [list(map(abs, w)) for w in weights]
    )
    return [Move([False] * layer.size, mask) for layer, mask in zip(layers, after, strict=True)]
