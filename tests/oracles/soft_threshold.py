"""ST-3: Vanderschueren & De Vleeschouwer 2023, https://arxiv.org/abs/2212.01076; read beside vanderschuea/stthree.

All weights are kept and trained. The network sees sign(w) (|w| - h) where |w| > h, and zero elsewhere; h is one
threshold for the network, at which the density is that of the cubic schedule. Gradients pass straight through: that of
what is seen is that of w.

Their code interpolates h between the largest magnitude that is not seen and the smallest that is, rescales each neuron,
and moves h every step (an option: every k). In the library h is the largest magnitude that is not seen, so that exactly
as many weights are seen as the density says; nothing is rescaled, and h moves every 100 steps.
"""

from oracles import gmp
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
