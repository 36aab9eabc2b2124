"""GraNet: Liu et al. 2021, https://arxiv.org/abs/2106.10404, algorithm 1; read beside VITA-Group/GraNet.

Begins with half of the weights, by ERK. Every dt steps the network is first pruned to the cubic schedule of Zhu &
Gupta, the smallest weights of all layers (`pruning`). Then, to the end of the training, each layer gives up the
fraction p of what it has left, the smallest, and gets as many back by the largest |gradient| (`truncate_weights`). p
falls as a cosine over the whole training; the momentum of inactive weights is zero in their code.
"""

from fractions import Fraction

from oracles import distributions, schedules
from oracles.network import Move, drop_lowest_of_network, largest_remainders, magnitudes, rounded_up
from oracles.reference import add_highest, drop_lowest

FIRST, END = 0.5, 0.75


def start(layers, course):
    sizes = [layer.size for layer in layers]
    total = round(FIRST * sum(sizes))
    real = distributions.erdos_renyi_kernel([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    return largest_remainders(total, real, sizes)


def end(course):
    return round(END * course.steps)


def moves(step, course):
    return step % course.every == 0 or step == end(course)


def density(step, course):
    return schedules.cubic(FIRST, course.density, step, end(course))


def rate(step, course):
    return schedules.cosine(0.5, step, course.steps, lowest=0.005)


def update(layers, step, course):
    scores, masks = [magnitudes(layer) for layer in layers], [layer.mask for layer in layers]
    total = round(density(step, course) * sum(layer.size for layer in layers))
    fallen = drop_lowest_of_network(scores, masks, sum(map(sum, masks)) - total)
    found = []
    for layer, mask, score in zip(layers, fallen, scores, strict=True):
        k = rounded_up(rate(step, course) * sum(mask))
        kept = drop_lowest(score, mask, k)
        found.append(Move(kept, add_highest([abs(g) for g in layer.gradient], kept, k), forget=True))
    return found
