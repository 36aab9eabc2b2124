"""One-shot magnitude pruning: Han et al. 2015, https://arxiv.org/abs/1506.02626, section 3, with one round.

Trains the dense network, removes the smallest weights once, half-way, and trains what is left. The library takes one
threshold for the network, where the paper has one for each layer.
"""

from oracles import gmp

start = gmp.start


def moves(step, course):
    return step == round(course.steps / 2)


def update(layers, step, course):
    return gmp.smallest_leave(layers, course.density)
