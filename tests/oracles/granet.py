"""GraNet: Liu et al. 2021, https://arxiv.org/abs/2106.10404, algorithm 1; read beside VITA-Group/GraNet.

Begins with half of the weights, by ERK. Every dt steps the network is first pruned to the cubic schedule of Zhu &
Gupta, the smallest weights of all layers (`pruning`). Then, to the end of the training, each layer gives up the
fraction p of what it has left, the smallest, and gets as many back by the largest |gradient| (`truncate_weights`). p
falls as a cosine over the whole training; the momentum of inactive weights is zero in their code.
"""

from fractions import Fraction

from oracles import distributions, schedules
from oracles.network import Move, drop_lowest_of_network, fall, largest_remainders, magnitudes, none_empty, rounded_up
from oracles.reference import add_highest, drop_lowest

FIRST = 0.5


def start(layers, course):
    sizes = [layer.size for layer in layers]
    total = round(FIRST * sum(sizes))
    real = distributions.erdos_renyi_kernel([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    return largest_remainders(total, real, sizes)


def end(course):
    return 3 * course.steps // 4


def moves(step, course):
    return step % course.every == 0 or step == end(course)


def density(step, course):
    return schedules.cubic(FIRST, course.density, step, end(course))


def rate(step, course):
    return schedules.cosine(0.5, step, course.steps, lowest=0.005)


def update(layers, step, course):
    scores, masks = [magnitudes(layer) for layer in layers], [layer.mask for layer in layers]
    total = round(density(step, course) * sum(layer.size for layer in layers))
    fallen = drop_lowest_of_network(scores, masks, max(sum(map(sum, masks)) - total, 0))
    rise = [max(-lost, 0) for lost in fall(layers, total)]  # where a layer is frozen, the others may lack some
    found = []
    for layer, mask, score, more in zip(layers, fallen, scores, rise, strict=True):
        k = rounded_up(rate(step, course) * sum(mask))
        kept = drop_lowest(score, mask, k)
        found.append(add_highest([abs(g) for g in layer.gradient], kept, k + more))
    after = none_empty(found, masks, scores)
    return [Move([False] * len(mask), mask, forget=True) for mask in after]
