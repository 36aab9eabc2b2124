"""Static random masks: the baseline of Evci et al. 2020, https://arxiv.org/abs/1911.11134, section 4.

Erdos-Renyi-kernel densities, and no updates.
"""

from oracles import rigl

start = rigl.start


def moves(step, course):
    return False


def update(layers, step, course):
    raise AssertionError("static masks have no updates")
