"""A weight that grows late in training with Adam: its steps, and the mean that its state may start from.

Adam (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980), algorithm 1, on Python numbers:

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    step = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

t counts the optimizer's steps and not the weight's, so that late in training nothing corrects an m and v of zero.
"""

import math

B1, B2, EPS = 0.9, 0.999, 1e-8


def steps(m, v, gradients, t):
    """Return the steps over the learning rate for these gradients, the first of which is that of step t + 1."""
    taken = []
    for g in gradients:
        t += 1
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        taken.append(m / (1 - B1**t) / (math.sqrt(v / (1 - B2**t)) + EPS))
    return taken


def mean_over_active(values, before, after):
    """Return the mean of a layer's values over the weights that are active before and after an update; 0 if none."""
    kept = [value for value, was, is_now in zip(values, before, after, strict=True) if was and is_now]
    return math.fsum(kept) / len(kept) if kept else 0.0
