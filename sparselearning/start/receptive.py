"""Receptive fields: masks in which an output is linked to inputs near its own place.

Zhang et al. 2025, Brain network science modelling of sparse neural networks enables Transformers and LLMs to perform as
fully connected, NeurIPS, https://arxiv.org/abs/2501.19107, section 3.2 and appendix D: the bipartite receptive field
(BRF) with a fixed number of inputs for each output. Both sides of a layer lie on a ring. An output draws its inputs
without replacement, one at distance d in proportion to (1 + d)^-((1 - r) / r): r = 0 takes the nearest, r = 1 any.
"""

import torch
from torch import Tensor

from sparselearning.layer import SparseLayer
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded, placed_like

RANDOMNESS = 0.25  # r of the paper, which is best there for image classification
TOGETHER = 2**22  # entries whose order is found at once


def receptive_scores(layer: SparseLayer) -> Tensor:
    """Return scores of a layer's weights whose highest make a mask; whatever their number, outputs have equally many.

    The score of an input that an output draws as its k-th is -k, and less by a fraction that is the output's.
    """
    outputs, inputs = layer.orientation.matrix(torch.empty(layer.shape, device="meta")).shape
    device = layer.mask.device
    scores = torch.empty(outputs, inputs, device=device)
    last = torch.randperm(outputs, device=device) / max(outputs, 1)
    rows = max(TOGETHER // max(inputs, 1), 1)
    for first in range(0, outputs, rows):
        part = torch.arange(first, min(first + rows, outputs), device=device)
        exponential = -torch.rand(len(part), inputs, device=device).log()
        keys = log_shares(part * inputs / outputs, inputs) - exponential.log()  # its order is that of the draws
        order = keys.argsort(dim=1, descending=True)
        ranks = torch.arange(inputs, device=device, dtype=torch.float32).expand_as(order)
        scores[part] = torch.empty_like(keys).scatter_(1, order, -ranks) - last[part].unsqueeze(1)
    scores = layer.orientation.tensor(scores, layer.shape)
    return placed_like(layer.mask, distributed.send_to_all(scores)) if is_sharded(layer.mask) else scores


def log_shares(places: Tensor, inputs: int) -> Tensor:
    """Return the logarithm of what each input is drawn in proportion to, (outputs, inputs), by outputs at `places`.

    >>> log_shares(torch.tensor([0.0]), 4).exp().round(decimals=4)  # distances 0, 1, 2, 1
    tensor([[1.0000, 0.1250, 0.0370, 0.1250]])
    """
    distance = (torch.arange(inputs, device=places.device) - places.unsqueeze(1)).abs()
    distance = torch.minimum(distance, inputs - distance)
    return -(1 - RANDOMNESS) / RANDOMNESS * torch.log1p(distance)
