"""Guided stochastic exploration: Heddes et al. 2024, https://arxiv.org/abs/2401.06898, algorithm 1; read beside the
authors' code, mikeheddes/guided-stochastic-exploration.

Every 1000 steps until 60% of the training (120 of 200 epochs), layer by layer: a fraction of the weights leaves, 0.2
that falls to 0 as a cosine, the smallest, and as many come, at zero and without momentum: those of largest |gradient|
among as many candidates as there are active weights, drawn where the gradient can be large. Which are drawn is up to
chance, so that any may come; tests/test_grow.py sees how often, and that the largest of them do.

Their code grows before it prunes, so that what has just been pruned stays away, and compares over the whole network.
"""

from oracles import schedules
from oracles import set as set_
from oracles.network import Move, every_steps, magnitudes, rounded_up
from oracles.reference import drop_lowest

END = 0.6

start = set_.start


def moves(step, course):
    return every_steps(step, course, until=END)


def rate(step, course):
    return schedules.cosine(0.2, step, round(END * course.steps))


def update(layers, step, course):
    found = []
    for layer in layers:
        k = rounded_up(rate(step, course) * layer.active)
        found.append(Move(drop_lowest(magnitudes(layer), layer.mask, k), k, forget=True))
    return found
