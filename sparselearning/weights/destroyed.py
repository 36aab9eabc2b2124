"""Nonzero weights of a trained network that masks are about to set to zero: what a warning says of them."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.layer import SparseLayer
from sparselearning.processes.sharded import count_active, fetch, local_part
from sparselearning.start.distributions import DISTRIBUTIONS as DRAWN
from sparselearning.start.masks import SparseInit
from sparselearning.weights.optimizer import state_of

logger = logging.getLogger(__name__)

MANY = 0.1  # of the nonzero weights
LOOKS = (
    10  # at weights that were written, in an epoch: a loop that writes them in every step need not wait for a device
)


def warn_of_masks(
    masking: Any, module: nn.Module, layers: Sequence[SparseLayer], sparse_init: SparseInit, state: dict | None
) -> None:
    """Warn if masks that were drawn or loaded set many nonzero weights of a network that looks trained to zero.

    Masks that a caller gives, and scores, choose among these weights knowingly.
    """
    if state is None and not callable(sparse_init) and (not isinstance(sparse_init, str) or sparse_init not in DRAWN):
        return
    layers = [layer for layer in layers if layer.start_places is None]
    nonzero, lost = _counts(layers)
    size = sum(layer.size for layer in layers)
    if lost > MANY * nonzero and (nonzero < (1 - MANY) * size or _is_trained(masking, module, layers)):
        logger.warning(
            "The new masks set %d of %d nonzero weights to zero, of a network that looks trained. To go on with its "
            "own masks: add_module(..., state=saved) takes what masking.state_dict() returned, and "
            "sparse_init='resume' its nonzero weights.",
            lost,
            nonzero,
        )


def _is_trained(masking, module, layers):
    """Tell whether the optimizer has stepped weights, or a BatchNorm has seen batches."""
    batches = (buffer for name, buffer in module.named_buffers() if name.endswith("num_batches_tracked"))
    return any(state_of(masking.optimizer, layer.master) for layer in layers) or any(map(_is_positive, batches))


def _is_positive(number: Tensor) -> bool:
    return not number.is_meta and bool(number > 0)


def remember(layers: Iterable[SparseLayer]) -> None:
    """Note that the weights are masked as they are now."""
    for layer in layers:
        layer.version = layer.master._version


def warn_of_written_weights(masking: Any) -> None:
    """Warn if weights were written since they were masked, and the coming step sets many nonzero ones to zero."""
    written = [layer for layer in masking.layers if layer.version != layer.master._version]
    if not written or masking.held.keeps_inactive or masking.looks_left <= 0:
        return
    masking.looks_left -= 1
    nonzero, lost = _counts_here(written)
    if lost > MANY * nonzero:
        logger.warning(
            "Weights were written since the last step, and this one sets %d of %d nonzero weights of %s to zero. If a "
            "trained network was loaded, load its masks too, before the step: masking.load_state_dict(saved).",
            lost,
            nonzero,
            ", ".join(layer.name for layer in written),
        )


@torch.no_grad()
def _counts(layers):
    """Return how many weights are nonzero, and how many of them are inactive."""
    return _added(layers, [layer.in_memory() for layer in layers])


@torch.no_grad()
def _counts_here(layers):
    """Return the same of the parts that this process holds; the others may have written nothing."""
    return _added(layers, [tuple(map(local_part, layer.in_memory())) for layer in layers])


def _added(layers, pairs):
    active = [weight != 0 for weight, _ in pairs]
    lost = [nonzero & ~mask for nonzero, (_, mask) in zip(active, pairs, strict=True)]
    counts = fetch([count_active(mask) for mask in [*active, *lost]])
    return int(sum(counts[: len(layers)])), int(sum(counts[len(layers) :]))
