"""ST-3: Vanderschueren & De Vleeschouwer 2023, https://arxiv.org/abs/2212.01076; read beside vanderschuea/stthree.

All weights are kept and trained. The network sees sign(w) (|w| - h) where |w| > h, and zero elsewhere; h is one
threshold for the network, at which the density is that of the cubic schedule. Gradients pass straight through: that of
what is seen is that of w.

Their code interpolates h between the largest magnitude that is not seen and the smallest that is, rescales each neuron,
and moves h every step (an option: every k). In the library h is the largest magnitude that is not seen, so that exactly
as many weights are seen as the density says; nothing is rescaled, and h moves every 100 steps.
"""

import torch

from oracles import gmp, top_kast
from oracles.network import highest_of_network, none_empty

start, moves, density, end = gmp.start, gmp.moves, gmp.density, gmp.end


def update(weights, masks, share):
    """Return the masks and the threshold at a density of the network."""
    scores = [[abs(value) for value in weight] for weight in weights]
    total = max(round(share * sum(map(len, weights))), len(weights))
    after = none_empty(highest_of_network(scores, total), masks, scores)
    pairs = zip([s for score in scores for s in score], [m for mask in after for m in mask], strict=True)
    return after, max((score for score, seen in pairs if not seen), default=0.0)


def seen(value, active, threshold):
    """Return what the network sees of a weight."""
    if not active or abs(value) <= threshold:
        return 0.0
    return value - threshold if value > 0 else value + threshold


class Network(top_kast.Network):
    """Dense weights theta, all of them trained, and the threshold by which they are seen."""

    def choose(self):
        self.masks, self.threshold = [torch.ones_like(theta, dtype=torch.bool) for theta in self.theta], 0.0

    def train(self, optimizer, decay):
        for theta in self.theta:
            theta.grad = theta.grad + decay * theta
        optimizer.step()

    def move(self, step, course):
        weights = [theta.flatten().tolist() for theta in self.theta]
        masks = [mask.flatten().tolist() for mask in self.masks]
        after, self.threshold = update(weights, masks, density(step, course))
        self.masks = [torch.tensor(mask).reshape(theta.shape) for mask, theta in zip(after, self.theta, strict=True)]

    def seen(self):
        return [
            torch.tensor(
                [
                    seen(value, active, self.threshold)
                    for value, active in zip(theta.flatten().tolist(), mask.flatten().tolist(), strict=True)
                ]
            ).reshape(theta.shape)
            for theta, mask in zip(self.theta, self.masks, strict=True)
        ]
