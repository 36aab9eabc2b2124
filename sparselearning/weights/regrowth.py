"""What weights start from: the value and optimizer state of one that becomes active, and the norms of all layers."""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselearning.layer import SparseLayer
from sparselearning.processes import distributed
from sparselearning.processes.sharded import add_up, is_sharded, local_part, uniform_like
from sparselearning.weights.start_states import group_of, start_of_state, state_per_weight

START_VALUES = ("zero", "random")


@torch.no_grad()
def keep_norms(layers: Iterable[SparseLayer]) -> None:
    """Enlarge the weights of each layer until its active ones have the norm that all its weights had.

    Weights are initialised for as many inputs as a dense layer has; with few of them left, signals and gradients fade
    from layer to layer, and a deep network at a density of 1% may not learn at all (Evci et al. 2022,
    https://arxiv.org/abs/2010.03533, who initialise each neuron for the inputs that it has).
    """
    for layer in layers:
        if layer.start_places is not None:  # there are no others; their norm is what is expected of as many
            layer.start_scale = math.sqrt(layer.size / max(layer.nonzeros, 1))
            continue
        weight = layer.master
        squares = weight.float().square()
        every, active = add_up([squares.sum(), (squares * layer.mask).sum()])
        if 0 < active < every < math.inf:
            layer.set_weight(weight * every.div(active).sqrt())


def start_regrown(
    layers: Sequence[SparseLayer],
    before: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    value: str,
    state: str | None,
    copies: Collection[str],
) -> None:
    """Set value and optimizer state of the weights that became active since the masks were `before`.

    `value` is 'zero', which an inactive weight has already, or 'random'; `state` is one of START_STATES, or None to
    leave it; `copies` are names of second copies of the weights in it. A weight that was pruned and grown in one update
    goes on as it was.
    """
    if state is None and value == "zero":
        return
    for layer, old in zip(layers, before, strict=True):
        regrown = layer.mask & ~old
        if state is not None and (entries := state_per_weight(optimizer, layer.master)):
            group = group_of(optimizer, layer.master)
            starts = start_of_state(state, entries, layer.mask & old, group, copies)
            for name, start in starts.items():
                local_part(entries[name]).masked_fill_(local_part(regrown), start)
        if value == "random":
            draw(layer, regrown)


def pull_to_zero(weights: Sequence[Tensor], strength: float, optimizer: torch.optim.Optimizer) -> None:
    """Add `strength` * sign(weight) to the gradients of weights, as an L1 term in the loss would."""
    signs = gradient_signs(optimizer)
    for weight in weights:
        if weight.grad is not None:
            weight.grad.add_(weight.sign() * (strength * signs.get(id(weight), 1.0) * gradient_scale(optimizer)))


def gradient_signs(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """Return by the id of each weight what turns a term of a loss to minimise into one of the optimizer's gradients.

    It is -1 in groups with `maximize=True`, whose gradients the optimizer negates before it adds its weight decay.
    """
    return {
        id(weight): -1.0 if group.get("maximize") else 1.0
        for group in optimizer.param_groups
        for weight in group["params"]
    }


def gradient_scale(optimizer: torch.optim.Optimizer) -> Tensor | float:
    """Return the factor that gradients still carry: a fused optimizer undoes GradScaler's scale in its kernel."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def draw(layer: SparseLayer, regrown: Tensor) -> None:
    """Draw the regrown weights as torch initialises linear layers and convolutions: uniform in +-1 / sqrt(inputs).

    The scale of the trained weights is no measure: every draw would make the next one larger.
    """
    weight = layer.master
    values = (2 * uniform_like(layer.mask) - 1) / math.sqrt(_inputs(layer))
    if not is_sharded(values):
        distributed.send_to_all(values)
    layer.set_weight(torch.where(regrown, values.to(weight.dtype), weight))


def draw_new(layer: Any, new: Tensor) -> None:
    """Draw the same for new values of a layer that holds active weights alone; `new` is (nonzeros,)."""
    value = layer.entries.value.detach()
    drawn = distributed.send_to_all(
        (2 * torch.rand(int(new.sum()), device=value.device) - 1) / math.sqrt(_inputs(layer))
    )
    value[new] = drawn.to(value.dtype)


def _inputs(layer):
    return math.prod(layer.orientation.layer(layer.shape)[1:])
