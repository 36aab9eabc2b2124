"""SET: Mocanu et al. 2018, https://arxiv.org/abs/1707.04780, algorithm 1; read beside the authors' Keras code.

At the end of every epoch but the last, layer by layer: a fraction of the positive weights leaves, the smallest, and the
same fraction of the negative ones, the largest; as many come at random, which their code (`rewireMask`) starts at zero.

The library lets the fraction fall as a cosine, and removes ceil(fraction * active) weights exactly: the two parts are
rounded together, by largest remainders. A weight that is zero counts as positive.
"""

from fractions import Fraction

from oracles import distributions, schedules
from oracles.network import Move, at_end_of_epochs, exactly, largest_remainders, rounded_up
from oracles.reference import drop_lowest


def start(layers, course):
    total, sizes = exactly(layers, course), [layer.size for layer in layers]
    real = distributions.erdos_renyi([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    return largest_remainders(total, real, sizes)


def moves(step, course):
    return at_end_of_epochs(step, course)


def rate(step, course):
    return schedules.cosine(0.3, step, course.steps, lowest=0.005)


def update(layers, step, course):
    found = []
    for layer in layers:
        k = rounded_up(rate(step, course) * layer.active)
        negative = [active and value < 0 for active, value in zip(layer.mask, layer.weight, strict=True)]
        positive = [active and not below for active, below in zip(layer.mask, negative, strict=True)]
        of_positive = smallest_of_each_sign(k, sum(positive), sum(negative))
        kept_positive = drop_lowest(layer.weight, positive, of_positive)
        kept_negative = drop_lowest([-value for value in layer.weight], negative, k - of_positive)
        found.append(Move([a or b for a, b in zip(kept_positive, kept_negative, strict=True)], k))
    return found


def smallest_of_each_sign(k, positive, negative):
    """Return how many of k are positive, when the same fraction of each sign leaves; of equal remainders, positive."""
    if not positive + negative:
        return 0
    exact = Fraction(k * positive, positive + negative)
    return int(exact) + (exact - int(exact) >= Fraction(1, 2))
