"""SMET: Xiao et al. 2026, https://arxiv.org/abs/2606.00888; read beside the authors' code, QiaoXiao7282/SMET.

Every 100 steps, layer by layer: a fraction of the weights leaves, the smallest, and as many come at random, at zero and
with moments of zero. Adam (Kingma & Ba 2015, algorithm 1) counts the steps of each weight, t_i, from when it came:

    a_i = a / sqrt(d) * min(t_i / W, 1)        (the warm-up, of W steps, is that of weights that have come)
    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    w <- w - a_i * m / (1 - b1^t_i) / (sqrt(v / (1 - b2^t_i)) + eps)

d is the density of the layer. AdamW (Loshchilov & Hutter 2019) takes a_i * decay * w off the weight, Adam adds
decay * w to g, and with `amsgrad` the largest v so far stands in the root. Their code draws among what was inactive
before the update, multiplies m itself by t_i / W in every step, and divides the rate by d, which is off by default.
"""

import math

from oracles import schedules, sparse_momentum
from oracles.network import Move, magnitudes, rounded_up
from oracles.reference import drop_lowest

start = sparse_momentum.start


def moves(step, course):
    return step % course.every == 0


def rate(step, course):
    return schedules.cosine(0.2, step, course.steps, lowest=0.005)


def update(layers, step, course):
    found = []
    for layer in layers:
        k = rounded_up(rate(step, course) * layer.active)
        found.append(Move(drop_lowest(magnitudes(layer), layer.mask, k), k, forget=True))
    return found


class Weight:
    """One weight and what Adam knows of it."""

    def __init__(self, value, active):
        self.value, self.active, self.grown = value, active, False
        self.m = self.v = self.largest = 0.0
        self.steps = 0

    def become(self, active):
        """Let the weight leave or come."""
        if active and not self.active:
            self.m = self.v = self.largest = 0.0
            self.steps, self.grown = 0, True
        self.active = active
        self.value = self.value if active else 0.0

    def step(self, gradient, density, warm_up, lr, betas, eps, weight_decay, decoupled, amsgrad, maximize):
        """Make a step; an inactive weight only has moments, and stays at zero."""
        gradient = -gradient if maximize else gradient
        gradient += 0 if decoupled else weight_decay * self.value
        self.steps += 1
        self.m = betas[0] * self.m + (1 - betas[0]) * gradient
        self.v = betas[1] * self.v + (1 - betas[1]) * gradient**2
        self.largest = max(self.largest, self.v)
        own = lr / math.sqrt(density) * (min(self.steps / warm_up, 1) if warm_up and self.grown else 1)
        m, v = self.m / (1 - betas[0] ** self.steps), self.largest if amsgrad else self.v
        taken = own * m / (math.sqrt(v / (1 - betas[1] ** self.steps)) + eps)
        if self.active:
            self.value += -own * weight_decay * self.value * decoupled - taken
