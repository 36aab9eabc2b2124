"""Top-KAST: Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517, sections 2.1 to 2.3.

All weights theta are kept. In each layer A are its D largest magnitudes, and B the D + M largest: the network sees
theta on A (alpha), and theta is trained on B. The loss has the exploration term, one for the optimizer's weight decay:

    reg(theta_i) = decay / 2 * theta_i^2 on A, decay / 2 * theta_i^2 / D on B outside A, 0 elsewhere

The paper names a density for A and one for B; the library takes |B| = 2 |A|. It divides D among layers by ERK and,
where the paper chooses A and B before every step, chooses them every 100 steps.
"""

import torch

from oracles import rigl
from oracles.network import Layer, highest_of_network

start = rigl.start


def moves(step, course):
    return step % course.every == 0


def sets(theta, active):
    """Return A and B of a layer as masks, for so many active weights."""
    size = len(theta)
    (a,) = highest_of_network([[abs(value) for value in theta]], active)
    (b,) = highest_of_network([[abs(value) for value in theta]], min(2 * active, size))
    return a, b


class Network:
    """Dense weights theta, with the sets A (`masks`) and B (`trained`) of each."""

    def __init__(self, theta, active):
        self.theta, self.active = theta, active
        self.choose()

    def choose(self):
        found = [sets(theta.flatten().tolist(), k) for theta, k in zip(self.theta, self.active, strict=True)]
        self.masks, self.trained = (
            [torch.tensor(pair[i]).reshape(theta.shape) for pair, theta in zip(found, self.theta, strict=True)]
            for i in (0, 1)
        )

    def counts(self):
        return [int(mask.sum()) for mask in self.masks]

    def layers(self):
        return [Layer(tuple(theta.shape), [], [], [], []) for theta in self.theta]

    def train(self, optimizer, decay):
        """Step theta on B, where the gradient is that of the loss and of the exploration term."""
        before = [theta.clone() for theta in self.theta]
        for theta, a, b in zip(self.theta, self.masks, self.trained, strict=True):
            density = int(a.sum()) / a.numel()
            theta.grad = torch.where(b, theta.grad + theta * torch.where(a, decay, decay / density), 0.0)
        optimizer.step()
        for theta, old, b in zip(self.theta, before, self.trained, strict=True):
            theta.copy_(torch.where(b, theta, old))

    def move(self, step, course):
        self.choose()

    def seen(self):
        return [torch.where(a, theta, 0.0) for theta, a in zip(self.theta, self.masks, strict=True)]
