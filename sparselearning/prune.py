"""Pruning: which active weights leave."""

from typing import Any

import torch
from torch import Tensor

from sparselearning.functions import entrywise, network_wide, reads, single_weights
from sparselearning.processes import distributed
from sparselearning.processes.sharded import count_active, fetch, highest, is_sharded, local_part, uniform_like
from sparselearning.selection import (
    add_highest,
    add_highest_jointly,
    apportion,
    count_of,
    drop_lowest,
    drop_lowest_jointly,
)
from sparselearning.weights.dense_copy import dense_weight


@entrywise
@reads("nothing")
def magnitude_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the ceil(prune rate * active weights) weights of smallest magnitude |W|.

    Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks,
    https://arxiv.org/abs/1506.02626, section 3; as sparse momentum and RigL do, layer by layer and to an exact count.
    """
    return drop_lowest(weight.abs(), mask, count_to_remove(masking, name))


@single_weights
@entrywise
@reads("nothing")
def magnitude_and_negativity_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the smallest positive and the largest negative weights, the same fraction of each.

    Mocanu et al. 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
    Network Science (SET), https://arxiv.org/abs/1707.04780, algorithm 1. The two counts are rounded together, so that
    as many leave as for any other method. Active zeros count as positive.
    """
    negative = mask & (weight < 0)
    positive = mask & ~negative
    available = [int(count) for count in fetch([positive.sum(), negative.sum()])]
    smallest, largest = apportion(count_to_remove(masking, name), available, available)
    return drop_lowest(weight, positive, smallest) | drop_lowest(-weight, negative, largest)


@single_weights
@entrywise
@reads("nothing")
def soft_magnitude_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Draw the weights that stay in proportion to a power of their magnitude, so that small ones leave most often.

    Zhang et al. 2025, Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected, NeurIPS, https://arxiv.org/abs/2501.19107 (CHTs), section 3.1 with alpha = 1: without
    replacement, by |W|^(d / (1 - d)), where the softness d rises from 0.5 to 0.9 on a line until the masks stay
    (`updates.last`, or the end of the prune rate's decay); it stays 0.5 if neither is known. That is the same as to
    keep the highest |W|^(d / (1 - d)) / E, with a random E of the exponential distribution for each weight. As in the
    authors' code, magnitudes count as at least 1e-12; there the power rises on a line, from 1 to 9.
    """
    softness = 0.5 + 0.4 * progress_of(masking)
    score = softness / (1 - softness) * weight.abs().clamp(min=1e-12).log()
    return drop_lowest(score - exponential_of(mask).log(), mask, count_to_remove(masking, name))


def progress_of(masking) -> float:
    """Return the fraction of the steps in which masks move that have been made; 0 if their end is not known."""
    end = masking.updates.last or getattr(masking.prune_rate_decay, "T_max", None)
    return min(masking.steps / end, 1.0) if end else 0.0


def exponential_of(mask: Tensor) -> Tensor:
    """Return random numbers of the exponential distribution for active entries, those of a row-major list of these."""
    if is_sharded(mask):
        return -uniform_like(mask).log()
    drawn = torch.rand(int(mask.sum()), device=mask.device)
    return -torch.ones(mask.shape, device=mask.device).masked_scatter_(mask, drawn).log()


@network_wide
@entrywise
@reads("nothing")
def global_magnitude_prune(masking) -> dict[str, Tensor]:
    """Drop the weights of smallest magnitude |W| in the whole network, as many as layer by layer.

    Zhu & Gupta 2017, To prune, or not to prune, https://arxiv.org/abs/1710.01878, and Han et al. 2015 compare within a
    layer.
    """
    scores = [layer.master.abs() for layer in masking.layers]
    total = sum(count_to_remove(masking, layer.name) for layer in masking.layers)
    masks = drop_lowest_jointly(scores, list(masking.masks.values()), total)
    return dict(zip(masking.masks, masks, strict=True))


@network_wide
@single_weights
@entrywise
@reads("nothing")
def threshold_prune(masking) -> dict[str, Tensor]:
    """Drop the weights whose magnitude is at most `masking.prune_threshold`, one for the network.

    The threshold is kept from update to update and moved only when it would remove a number of weights
    that is more than 2% off the prune rate (`masking.tolerance`): then to the magnitude that meets it.
    """
    expected = sum(count_to_remove(masking, layer.name) for layer in masking.layers)
    kept = {layer.name: layer.mask & (layer.master.abs() > masking.prune_threshold) for layer in masking.layers}
    removed = masking.total_nonzero - sum(fetch([mask.sum() for mask in kept.values()]))
    if abs(removed - expected) <= masking.tolerance * expected:
        return kept
    exact = global_magnitude_prune(masking)
    dropped = [local_part(layer.master)[local_part(layer.mask & ~exact[layer.name])].abs() for layer in masking.layers]
    here = max((part.max().item() for part in dropped if part.numel()), default=0.0)
    masking.prune_threshold = highest(here, [layer.master for layer in masking.layers])
    return exact


@entrywise
@reads("gradient")
def magnitude_gradient_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the weights whose |weight| + 0.01 |gradient| is lowest.

    Yuan et al. 2021, MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge,
    https://arxiv.org/abs/2110.14032, equation 1: |w| + |lambda * dL/dw|; the paper leaves lambda open. The gradient is
    that of the last step.
    """
    score = weight.abs() + 0.01 * masking.get_gradient_for_weight(weight).abs()
    return drop_lowest(score, mask, count_to_remove(masking, name))


@single_weights
@reads("nothing")
def sign_flip_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the weights whose sign has changed. The count follows from the signs; the prune rate is not used.

    Bellec et al. 2018, Deep Rewiring, https://arxiv.org/abs/1711.05136, algorithm 1: a connection has a constant sign,
    also while it is dormant, and is removed when its weight would cross zero. Here an update looks at the signs, so a
    weight may be on the wrong side until then. A weight that is still zero is removed too, as the paper's L1 term would
    do. The first update notes the signs of weights, and draws those of zeros. There is no noise (temperature 0).
    """
    memory = masking.memory[name]
    noted = memory.get("sign", weight.sign().to(torch.int8))
    drawn = (uniform_like(mask) < 0.5).to(torch.int8) * 2 - 1
    if not is_sharded(drawn):
        distributed.send_to_all(drawn)
    memory["sign"] = torch.where(noted == 0, drawn, noted)
    return mask & (weight * memory["sign"] > 0)


@single_weights
@reads("inactive")
def dense_magnitude_prune(masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    """Drop the active weights that are not among the largest of all the layer's, inactive ones included.

    Jayakumar et al. 2020, Top-KAST: Top-K Always Sparse Training, https://arxiv.org/abs/2106.03517, section 2.1, with
    growth_mode="dense_magnitude": together they are A = {i : |theta_i| among the largest D * size of the layer}. The
    paper chooses A before every step, this one in an update.
    """
    keep = masking.name2nonzeros[name] - count_to_remove(masking, name)
    return mask & add_highest(dense_weight(masking, name).abs(), torch.zeros_like(mask), keep)


@network_wide
@single_weights
@reads("inactive")
def global_dense_magnitude_prune(masking) -> dict[str, Tensor]:
    """Drop the active weights that are not among the largest of the network, inactive ones included.

    Vanderschueren & De Vleeschouwer 2023, Are Straight-Through gradients and Soft-Thresholding all you need for Sparse
    Training?, https://arxiv.org/abs/2212.01076 (ST-3), whose threshold for the network follows the density.
    """
    scores = [dense_weight(masking, name).abs() for name in masking.masks]
    empty = [torch.zeros_like(mask) for mask in masking.masks.values()]
    largest = add_highest_jointly(scores, empty, masking.baseline_nonzero)
    return {name: mask & large for (name, mask), large in zip(masking.masks.items(), largest, strict=True)}


@network_wide
@single_weights
@entrywise
@reads("nothing")
def gradual_magnitude_prune(masking) -> dict[str, Tensor]:
    """Drop what the density falls by where weights are smallest in the network, then the prune rate in each layer.

    Liu et al. 2021, Sparse Training via Boosting Pruning Plasticity with Neuroregeneration,
    https://arxiv.org/abs/2106.10404 (GraNet), algorithm 1. The second part regenerates at no cost: with
    redistribution_mode="none" each layer grows as many as it lost in this part, as in the authors' code
    (VITA-Group/GraNet).
    """
    scores = [layer.master.abs() for layer in masking.layers]
    fall = max(masking.total_nonzero - masking.baseline_nonzero, 0)
    masks = drop_lowest_jointly(scores, list(masking.masks.values()), fall)
    left = [int(count) for count in fetch([mask.sum() for mask in masks])]
    if fall:
        for layer, number in zip(masking.layers, left, strict=True):
            layer.change = number - layer.nonzeros
    counts = [count_of(masking.prune_rate, number) for number in left]
    pruned = [drop_lowest(score, mask, k) for score, mask, k in zip(scores, masks, counts, strict=True)]
    return dict(zip(masking.masks, pruned, strict=True))


@network_wide
@single_weights
@entrywise
@reads("nothing")
def adaptive_threshold_prune(masking) -> dict[str, Tensor]:
    """Drop the weights whose magnitude is below `masking.prune_threshold`, then double or halve the threshold.

    Mostafa & Wang 2019, Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization, https://arxiv.org/abs/1902.05967 (DSR), algorithm 1: the threshold, one for the network, is
    doubled where fewer than 0.9 of the intended number were dropped, and halved where more than 1.1. Intended is the
    prune rate (the paper: a number of weights). A layer whose weights are all below keeps its largest; the authors'
    code (IntelAI/dynamic-reparameterization) keeps one, too.
    """
    expected = sum(count_to_remove(masking, layer.name) for layer in masking.layers)
    if not expected:
        return masking.masks
    kept = {layer.name: layer.mask & (layer.master.abs() >= masking.prune_threshold) for layer in masking.layers}
    left = fetch([count_active(mask) for mask in kept.values()])
    emptied = [layer for layer, count in zip(masking.layers, left, strict=True) if layer.nonzeros and not count]
    for layer in emptied:
        kept[layer.name] = drop_lowest(layer.master.abs(), layer.mask, layer.nonzeros - 1)
    removed = masking.total_nonzero - sum(left) - len(emptied)
    if removed < 0.9 * expected:
        masking.prune_threshold *= 2
    elif removed > 1.1 * expected:
        masking.prune_threshold /= 2
    return kept


def count_to_remove(masking: Any, name: str) -> int:
    """Return how many weights a layer is to remove: ceil(prune rate * active weights)."""
    return count_of(masking.name2prune_rate[name], masking.name2nonzeros[name])


PRUNE_FUNCTIONS = {
    "magnitude": magnitude_prune,
    "soft_magnitude": soft_magnitude_prune,
    "SET": magnitude_and_negativity_prune,
    "threshold": threshold_prune,
    "adaptive_threshold": adaptive_threshold_prune,
    "global_magnitude": global_magnitude_prune,
    "gradual_magnitude": gradual_magnitude_prune,
    "magnitude_gradient": magnitude_gradient_prune,
    "sign_flip": sign_flip_prune,
    "dense_magnitude": dense_magnitude_prune,
    "global_dense_magnitude": global_dense_magnitude_prune,
}
