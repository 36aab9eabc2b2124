"""Redistribution: how important a layer is, and so how many of the pruned weights it receives.

An importance is a number or a 0-d tensor; only its share in the sum over layers counts.
"""

import torch
from torch import Tensor


def momentum_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """Return the mean |momentum| over active weights (Dettmers & Zettlemoyer 2019, section 3.2)."""
    return _mean_over_active(masking.get_momentum_for_weight(weight).abs(), mask)


def magnitude_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> Tensor:
    """Return the mean magnitude over active weights."""
    return _mean_over_active(weight.abs(), mask)


def nonzero_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> int:
    """Return the number of active weights: layers keep their proportions (Mostafa & Wang 2019)."""
    return masking.name2nonzeros[name]


def no_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return 1: all layers alike. `Masking` gives each layer back what was pruned from it."""
    return 1.0


def _mean_over_active(score, mask):
    active = score[mask] if score.device.type == "cpu" else score.where(mask, 0)
    # Half precision would overflow, in the sum and in the count.
    precision = torch.promote_types(score.dtype, torch.float32)
    return active.sum(dtype=precision) / mask.sum().clamp(min=1)


REDISTRIBUTION_FUNCTIONS = {
    "momentum": momentum_redistribution,
    "magnitude": magnitude_redistribution,
    "nonzeros": nonzero_redistribution,
    "nonzero": nonzero_redistribution,
    "none": no_redistribution,
}
