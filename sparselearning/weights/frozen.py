"""Layers that do not train: an update of the masks leaves them as they are.

What is pruned from a layer that nothing trains is lost: what grows in its place starts at zero, and stays there.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sparselearning.functions import may_read
from sparselearning.layer import SparseLayer
from sparselearning.processes import distributed

logger = logging.getLogger(__name__)


def note_gradients(masking: Any) -> None:
    """Note in every layer whether it has a gradient in this step, or had one in a step since the last update."""
    for layer in masking.layers:
        if not layer.trained:
            layer.trained = masking.held.has_gradient(layer)


@contextmanager
def training_alone(masking: Any) -> Iterator[Sequence[SparseLayer]]:
    """Yield the layers that train; for so long the Masking has no others, and keeps as many weights as theirs.

    The others are frozen (`requires_grad=False`, or a learning rate of zero where other layers have one), or had no
    gradient in the steps since the last update; where a function may read gradients, also those that have none now.
    """
    layers = masking.layers
    idle = _idle(masking)
    masking.layers = [layer for layer in layers if layer not in idle]
    for layer in idle:
        layer.budget.nonzeros -= layer.nonzeros + layer.left_over
    if idle:
        _tell(idle, masking.layers)
    try:
        yield masking.layers
    finally:
        masking.layers = layers
        for layer in idle:
            layer.budget.nonzeros += layer.nonzeros + layer.left_over
    for layer in layers:
        layer.trained = None


def _idle(masking):
    layers, held = masking.layers, masking.held
    rates = _learning_rates(masking)
    idle = [is_frozen(layer) or layer.trained is False or rate == 0 for layer, rate in zip(layers, rates, strict=True)]
    if any(may_read(function, "gradient") for function in (masking.prune, masking.grow, masking.measure)):
        now = [held.gradient_is_known(layer) for layer in layers]
        if any(now):  # else the gradients were cleared, and the function says so
            idle = [found or not has for found, has in zip(idle, now, strict=True)]
    if distributed.in_process_group():
        flags = torch.tensor(idle, dtype=torch.int64, device=layers[0].weight.device)
        idle = distributed.sum_over_processes(flags).bool().tolist()
    return [layer for layer, found in zip(layers, idle, strict=True) if found]


def is_frozen(layer: SparseLayer) -> bool:
    """Tell whether a weight was frozen after it got its mask."""
    return not layer.weight.requires_grad


def _learning_rates(masking):
    """Return the learning rate of each layer; of all that are zero, as at the end of a schedule, none counts as frozen.

    Optimizers without a learning rate count as if they had one.
    """
    of_weight = {
        id(weight): float(group.get("lr", 1.0))
        for group in masking.optimizer.param_groups
        for weight in group["params"]
    }
    rates = [of_weight.get(id(masking.held.stepped_for(layer)), 1.0) for layer in masking.layers]
    return rates if any(rates) else [1.0] * len(rates)


def _tell(idle, training):
    names = ", ".join(layer.name for layer in idle)
    if training or all(map(is_frozen, idle)):
        logger.info("Frozen or without a gradient since the last update, so that the masks stay: %s.", names)
    else:
        logger.warning(
            "No layer with a mask had a gradient since the last update, so that the masks stay: %s. Check that the "
            "loss reaches them, and that the optimizer finds their gradients in weight.grad.",
            names,
        )
