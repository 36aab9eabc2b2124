"""Pruning: which active weights leave."""

import math

import torch
from torch import Tensor

from sparselearning.functions import network_wide
from sparselearning.selection import apportion, drop_lowest, drop_lowest_jointly
from sparselearning.sharded import add_up, highest, local_part


def magnitude_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the ceil(prune rate * active weights) weights of smallest magnitude."""
    return drop_lowest(weight.abs(), mask, _count_to_remove(masking, name))


def magnitude_and_negativity_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the smallest positive and the largest negative weights, half of the count each.

    Mocanu et al. 2018 (SET), https://arxiv.org/abs/1707.04780. Where one sign has too few weights, the
    other gives the rest; active zeros count as positive.
    """
    negative = mask & (weight < 0)
    positive = mask & ~negative
    available = [int(count) for count in torch.stack(add_up([positive.sum(), negative.sum()])).tolist()]
    half = apportion(_count_to_remove(masking, name), [1, 1], available)
    return drop_lowest(weight, positive, half[0]) | drop_lowest(-weight, negative, half[1])


@network_wide
def global_magnitude_prune(masking) -> dict[str, Tensor]:
    """Drop the weights of smallest magnitude in the whole network, as many as layer by layer."""
    scores = [layer.master.abs() for layer in masking.layers]
    total = sum(_count_to_remove(masking, layer.name) for layer in masking.layers)
    masks = drop_lowest_jointly(scores, list(masking.masks.values()), total)
    return dict(zip(masking.masks, masks, strict=True))


@network_wide
def threshold_prune(masking) -> dict[str, Tensor]:
    """Drop the weights whose magnitude is at most `masking.prune_threshold`, one for the network.

    The threshold is kept from update to update and moved only when it would remove a number of weights
    that is more than 2% off the prune rate (`masking.tolerance`): then to the magnitude that meets it.
    """
    expected = sum(_count_to_remove(masking, layer.name) for layer in masking.layers)
    kept = {layer.name: layer.mask & (layer.master.abs() > masking.prune_threshold) for layer in masking.layers}
    removed = masking.total_nonzero - sum(mask.sum() for mask in kept.values())
    if abs(removed - expected) <= masking.tolerance * expected:
        return kept
    exact = global_magnitude_prune(masking)
    dropped = [local_part(layer.master)[local_part(layer.mask & ~exact[layer.name])].abs() for layer in masking.layers]
    here = max((part.max().item() for part in dropped if part.numel()), default=0.0)
    masking.prune_threshold = highest(here, masking.layers[0].master)
    return exact


def _count_to_remove(masking, name):
    return math.ceil(masking.name2prune_rate[name] * masking.name2nonzeros[name])


PRUNE_FUNCTIONS = {
    "magnitude": magnitude_prune,
    "SET": magnitude_and_negativity_prune,
    "threshold": threshold_prune,
    "global_magnitude": global_magnitude_prune,
}
