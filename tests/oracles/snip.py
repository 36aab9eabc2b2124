"""SNIP: Lee et al. 2019, https://arxiv.org/abs/1810.02340, equations 5 to 7; read beside namhoonlee/snip-public.

Before training, the k = round(density * size) weights of the network with the largest |dL(c w)/dc| at c = 1 stay (their
code rounds as well). The scores are `scores_modes.snip_of`. No updates.
"""

import torch

from oracles import static
from oracles.network import highest_of_network, none_empty
from oracles.scores_modes import snip_of

moves = static.moves


def masks(model, batches, density):
    return start(
        {name: score.flatten().tolist() for name, score in snip_of(model, batches, False).items()}, density, model
    )


def start(scores, density, model):
    """Return the masks, by name, that scores by name choose."""
    flat = list(scores.values())
    k = round(density * sum(map(len, flat)))
    chosen = none_empty(highest_of_network(flat, k), [[True] * len(score) for score in flat], flat)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    return {name: torch.tensor(mask).reshape(shapes[name]) for name, mask in zip(scores, chosen, strict=True)}
