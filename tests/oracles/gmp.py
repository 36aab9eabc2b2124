"""Gradual magnitude pruning: Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878, equation 1 and section 3.

Begins dense. Every dt steps the smallest weights leave until the sparsity s_t is reached, and never return; the last
time after n dt steps, 75% of the training here. The library compares over the network, the paper within a layer.
"""

from oracles import schedules
from oracles.network import Move, drop_lowest_of_network, magnitudes, none_empty

END = 0.75


def start(layers, course):
    return [layer.size for layer in layers]


def end(course):
    return round(END * course.steps)


def moves(step, course):
    return (step % course.every == 0 and step < end(course)) or step == end(course)


def density(step, course):
    return schedules.cubic(1.0, course.density, step, end(course))


def update(layers, step, course):
    return smallest_leave(layers, density(step, course))


def smallest_leave(layers, share):
    """Prune the network to a share of its weights."""
    scores, masks = [magnitudes(layer) for layer in layers], [layer.mask for layer in layers]
    total = max(round(share * sum(layer.size for layer in layers)), len(layers))
    k = sum(layer.active for layer in layers) - total
    kept = none_empty(drop_lowest_of_network(scores, masks, k), masks, scores)
    return [Move(mask, [False] * len(mask)) for mask in kept]
