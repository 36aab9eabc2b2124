"""MEST (EM&S): Yuan et al. 2021, https://arxiv.org/abs/2110.14032, section 3; read beside boone891214/MEST.

Between two updates more weights are active than the density asks for. An update prunes to the density, layer by layer,
the weights of smallest |weight| + lambda |gradient| (equation 1), and grows again at random, to as many as the next one
will prune; the last one grows nothing. Their scripts lower the surplus in three stages; the library lets the fraction
that is pruned fall from 0.3 to 0 as a cosine until 75% of the training, gives lambda the value 0.01, and divides the
weights by ERK. n / (1 - f) weights are active between updates, so that n are left when the fraction f of them leaves.
"""

from fractions import Fraction

from oracles import distributions, rigl, schedules
from oracles.network import Move, fall, largest_remainders, rounded_up
from oracles.reference import drop_lowest

LAMBDA = 0.01


def start(layers, course):
    sizes = [layer.size for layer in layers]
    total = round(min(course.density / (1 - 0.3), 1.0) * sum(sizes))
    real = distributions.erdos_renyi_kernel([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    return largest_remainders(total, real, sizes)


def end(course):
    return round(rigl.END * course.steps)


def moves(step, course):
    return (step % course.every == 0 and step < end(course)) or step == end(course)


def density(step, course):
    if step >= end(course):
        return course.density
    return min(course.density / (1 - schedules.cosine(0.3, step, end(course))), 1.0)


def update(layers, step, course):
    """Prune to the density, and grow; a layer loses by the smaller surplus in proportion to its active weights."""
    total = round(density(step, course) * sum(layer.size for layer in layers))
    found = []
    for layer, lost in zip(layers, fall(layers, total), strict=True):
        k = rounded_up(schedules.cosine(0.3, step, end(course)) * (layer.active - max(lost, 0)))
        score = [abs(value) + LAMBDA * abs(slope) for value, slope in zip(layer.weight, layer.gradient, strict=True)]
        found.append(Move(drop_lowest(score, layer.mask, max(lost, 0) + k), k - min(lost, 0)))
    return found
