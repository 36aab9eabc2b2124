"""What a weight starts from when it becomes active: its value, and the optimizer's state; and what all start from."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparselearning.layers import SparseLayer
from sparselearning.processes import distributed
from sparselearning.processes.sharded import add_up, is_sharded, uniform_like

START_VALUES = ("zero", "random")


@torch.no_grad()
def keep_norms(layers: Iterable[SparseLayer]) -> None:
    """Enlarge the weights of each layer, until the norm of those that are active is what that of all was.

    Weights are initialised for as many inputs as a dense layer has; with few of them left, signals and gradients fade
    from layer to layer, and a deep network at a density of 1% may not learn at all (Evci et al. 2022,
    https://arxiv.org/abs/2010.03533, who initialise each neuron for the inputs that it has).
    """
    for layer in layers:
        weight = layer.master
        squares = weight.float().square()
        every, active = add_up([squares.sum(), (squares * layer.mask).sum()])
        if 0 < active < every < math.inf:
            weight.mul_(every.div(active).sqrt())
            if layer.weight is not weight:
                layer.weight.copy_(weight)


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
                draw(layer, regrown)


def pull_to_zero(weights: Sequence[Tensor], strength: float, optimizer: torch.optim.Optimizer) -> None:
    """Add `strength` * sign(weight) to the gradients of weights: that of an L1 term in the loss."""
    for weight in weights:
        if weight.grad is not None:
            weight.grad.add_(weight.sign() * (strength * gradient_scale(optimizer)))


def gradient_scale(optimizer: torch.optim.Optimizer) -> Tensor | float:
    """Return what gradients are still multiplied by: a fused optimizer under GradScaler divides inside its kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def reset_state(optimizer: torch.optim.Optimizer, weight: Tensor, regrown: Tensor) -> None:
    """Set everything that the optimizer keeps per entry of a weight to zero where `regrown`: momenta, variances."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(regrown, 0)


def draw(layer: SparseLayer, regrown: Tensor) -> None:
    """Draw the regrown weights as torch initialises linear layers and convolutions: uniform in +-1 / sqrt(inputs).

    Not as large as the others are by now: every draw would make the next one larger.
    """
    weight = layer.master
    values = (2 * uniform_like(layer.mask) - 1) / math.sqrt(math.prod(weight.shape[1:]))
    if not is_sharded(values):
        distributed.send_to_all(values)
    weight.copy_(torch.where(regrown, values.to(weight.dtype), weight))
    if layer.weight is not weight:
        layer.weight.copy_(weight)
