"""What a weight starts from when it becomes active: its value, and the optimizer's state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparselearning import distributed
from sparselearning.layer import SparseLayer
from sparselearning.sharded import add_up, is_sharded, uniform_like

START_VALUES = ("zero", "random")


def start_regrown(masking, before: Sequence[Tensor]) -> None:
    """Set value and optimizer state of the weights that became active since the masks were `before`.

    Zero is what an inactive weight is already. A weight that was pruned and grown in one update goes on as it was.
    """
    if masking.reset_state or masking.regrown == "random":
        for layer, old in zip(masking.layers, before, strict=True):
            regrown = layer.mask & ~old
            if masking.reset_state:
                reset_state(masking.optimizer, layer.master, regrown)
            if masking.regrown == "random":
                draw(layer, old, regrown)


def reset_state(optimizer: torch.optim.Optimizer, weight: Tensor, regrown: Tensor) -> None:
    """Set everything that the optimizer keeps per entry of a weight to zero where `regrown`: momenta, variances."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(regrown, 0)


def draw(layer: SparseLayer, old: Tensor, regrown: Tensor) -> None:
    """Draw the regrown weights of a layer uniformly, with the root mean square of those active before."""
    weight = layer.master
    squares, count = add_up([weight.masked_fill(~old, 0).square().sum(dtype=torch.float32), old.sum()])
    bound = (3 * squares / count.clamp(min=1)).sqrt()
    values = (2 * uniform_like(layer.mask) - 1) * bound
    if not is_sharded(values):
        distributed.send_to_all(values)
    weight.copy_(torch.where(regrown, values.to(weight.dtype), weight))
    if layer.weight is not weight:
        layer.weight.copy_(weight)
