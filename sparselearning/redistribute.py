"""Redistribution: how important a layer is, and so how many of the pruned weights it receives.

An importance is a number or a 0-d tensor; only its share in the sum over layers counts.
"""

import numpy as np
import torch
from torch import Tensor

from sparselearning.functions import after_pruning, entrywise, gives_back, in_proportion, reads
from sparselearning.native.zero import zero_inactive
from sparselearning.processes.sharded import added_up, local_part


@entrywise
@reads("momentum")
def momentum_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> Tensor | float:
    """Return the mean |momentum| over active weights.

    Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, section 3.2 and algorithm 1.
    """
    return _mean_over_active(masking.get_momentum_for_weight(weight).abs(), mask, masking.name2nonzeros[name])


@entrywise
@reads("nothing")
def magnitude_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> Tensor | float:
    """Return the mean magnitude over active weights."""
    return _mean_over_active(weight.abs(), mask, masking.name2nonzeros[name])


@entrywise
@reads("nothing")
def nonzero_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> int:
    """Return the number of active weights: layers keep their proportions."""
    return masking.name2nonzeros[name]


@after_pruning
@in_proportion
@entrywise
@reads("nothing")
def remaining_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> int:
    """Return the number of weights R_i that pruning left: layer i grows R_i / sum_j R_j of what was pruned.

    Mostafa & Wang 2019 (DSR), https://arxiv.org/abs/1902.05967, algorithm 1. What full layers cannot take is divided in
    the same proportions, as in the authors' code (IntelAI/dynamic-reparameterization).
    """
    return masking.name2nonzeros[name]


@gives_back
@entrywise
@reads("nothing")
def no_redistribution(masking, name: str, weight: Tensor, mask: Tensor) -> float:
    """Return 1 for every layer; the mark makes each layer grow what it lost."""
    return 1.0


def _mean_over_active(score, mask, count):
    """Return the mean; `score` is a new tensor, and used up."""
    zero_inactive([score], [mask])  # several times faster than score[mask] on a CPU, and waits for no device
    # In float64 the sum does not depend on the order, which differs where weights are sharded; MPS has none.
    precision = torch.float32 if score.device.type == "mps" else torch.float64
    if type(score) is Tensor and score.device.type == "cpu" and score.dtype == torch.float32:
        # torch would first copy the tensor to float64; numpy converts it a piece at a time.
        return float(score.detach().numpy().sum(dtype=np.float64)) / max(count, 1)
    return added_up(local_part(score).sum(dtype=precision) / max(count, 1), score)


REDISTRIBUTION_FUNCTIONS = {
    "momentum": momentum_redistribution,
    "magnitude": magnitude_redistribution,
    "nonzeros": nonzero_redistribution,
    "nonzero": nonzero_redistribution,
    "remaining": remaining_redistribution,
    "none": no_redistribution,
}
