"""SNIP: Lee et al. 2019, https://arxiv.org/abs/1810.02340, equations 5 to 7; read beside namhoonlee/snip-public.

Before training, the k = round(density * size) weights of the network with the largest |dL(c w)/dc| at c = 1 stay (their
code rounds as well). The scores are `scores_modes.snip_of`. No updates.
"""

from oracles import static
from oracles.network import exactly, highest_of_network, none_empty
from oracles.scores_modes import snip_of

moves, update = static.moves, static.update


def scores(model, batches):
    return snip_of(model, batches, training=False)


def start(layers, course, scores):
    """Return the masks that the scores of the layers, flat lists, choose."""
    k = exactly(layers, course)
    return none_empty(highest_of_network(scores, k), [[True] * layer.size for layer in layers], scores)
