"""GraSP: Wang et al. 2020, https://arxiv.org/abs/2002.07376, algorithm 1; read beside alecwangcq/GraSP.

Before training, the weights with the lowest -w * (H g) stay, those whose removal would take most of the gradient's
norm: round(density * size) of the network. Their code removes int((1 - density) * size) - 1, for it keeps the weight at
the threshold, and draws linear layers again before it scores. The scores are `scores_modes.grasp_of`. No updates.
"""

from oracles import snip, static
from oracles.scores_modes import grasp_of

moves, start = static.moves, snip.start


def masks(model, batches, density):
    return start(
        {name: score.flatten().tolist() for name, score in grasp_of(model, batches, True).items()}, density, model
    )
