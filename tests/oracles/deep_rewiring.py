"""Deep Rewiring: Bellec et al. 2018, https://arxiv.org/abs/1711.05136, algorithm 1; read beside
guillaumeBellec/deep_rewiring.

A weight is s theta with a constant sign s of its place and theta >= 0: active ones descend the gradient and an L1 term,
and where theta falls below zero the connection becomes dormant; as many dormant ones of the layer, chosen at random,
become active with theta = 0. Noise (temperature 0) is left out, and signs are looked at every 10 steps.
"""

from oracles import set as set_
from oracles.network import Move, every_steps

L1 = 1e-4

start = set_.start


def moves(step, course):
    return every_steps(step, course, until=1.0) or (step % course.every == 0 and step == course.steps)


def pull(layer):
    """Return the L1 term of an active weight's gradient."""
    return [L1 * ((value > 0) - (value < 0)) for value in layer.weight]


def update(layers, step, course):
    """`memory["sign"]` holds the constant sign of every place, drawn before training."""
    found = []
    for layer in layers:
        sign = layer.memory["sign"]
        kept = [active and s * value > 0 for active, s, value in zip(layer.mask, sign, layer.weight, strict=True)]
        found.append(Move(kept, layer.active - sum(kept)))
    return found
