"""What an optimizer keeps for the active values of layers that train on sparse kernels.

It is as long as the values. A state_dict holds it in dense form, zero where weights are inactive, so that it is the
same as that of masked or dense training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sparselearning.sparse.trained import Trained
from sparselearning.weights import start_states

# They read a weight as a matrix, or keep the values of all weights in one row; the active values in a row would be
# stepped by another algorithm.
SHAPED = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


def refuse_shaped(optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer steps each entry of a weight on its own.

    Raises:
        ValueError: if it does not.
    """
    if (name := type(optimizer).__name__) in SHAPED:
        raise ValueError(
            f"weights='sparse' gives the optimizer the active values of a weight in a row, and {name} does not step "
            "each entry on its own. Use SGD, Adam or AdamW, or weights='zero'."
        )


def exchange(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Let the optimizer step `new` in place of `old`, and move its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def group_of(optimizer: torch.optim.Optimizer, module: Trained) -> dict[str, Any]:
    """Return the optimizer's settings for a layer; `maximize` among them."""
    return {"maximize": False, **start_states.group_of(optimizer, module.value)}


def momentum_gain(optimizer: torch.optim.Optimizer, module: Trained) -> float:
    """Return SGD's momentum of a gradient that never changed, over that gradient; 0 for other optimizers.

    RMSprop's momentum is one of scaled gradients; one that never decays has no such sum.
    """
    group = group_of(optimizer, module)
    if "dampening" not in group or group["momentum"] >= 1:
        return 0.0
    gain = (1 - group["dampening"]) / (1 - group["momentum"])
    return -gain if group["maximize"] else gain


def vectors(state: Mapping[Any, Any], size: int) -> dict[Any, Tensor]:
    """Return the parts of a parameter's state that have an entry for each of `size` values."""
    return {key: item for key, item in state.items() if isinstance(item, Tensor) and item.shape == (size,)}


def carry_over(
    optimizer: torch.optim.Optimizer,
    module: Trained,
    position: Tensor,
    mask: Tensor,
    start: str | None,
    copies: Collection[str],
) -> None:
    """Keep the state of the values at `position`, in dense form, and start that of weights that grow in a new mask.

    It starts as `start_of_state` says. If `start` is None, SGD's momentum starts as if the mean of the observed
    gradients had been the gradient all along, and all else as with 'zero'.
    """
    state = optimizer.state.get(module.value, {})
    entries = vectors(state, len(position))
    group = start_states.group_of(optimizer, module.value)
    starts = start_states.start_of_state(start or "zero", entries, mask.flatten()[position], group, copies)
    mean, gain = module.observed.mean(), momentum_gain(optimizer, module)
    for key, tensor in entries.items():
        begun = torch.zeros_like(module.dense).reshape(-1) + starts[key]
        if start is None and key == "momentum_buffer" and mean is not None:
            begun = mean.reshape(-1) * gain
        state[key] = begun.scatter(0, position, tensor).reshape(mask.shape)


def in_dense_form(state: Mapping[Any, Any], module: Trained) -> dict[Any, Any]:
    """Return the state of a layer's values, with tensors of its weight's shape and layout."""
    return {**state} | {
        key: spread(tensor, module.position, module.dense) for key, tensor in vectors(state, len(module.value)).items()
    }


def save(optimizer: torch.optim.Optimizer, saved: dict[str, Any], trained: Mapping[str, Trained]) -> dict[str, Any]:
    """Return the optimizer's state_dict `saved` with the state of `trained` layers in dense form."""
    modules = {id(module.value): module for module in trained.values()}
    state = dict(saved["state"])
    for numbers, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(numbers["params"], group["params"], strict=True):
            if id(parameter) in modules and number in state:
                state[number] = in_dense_form(state[number], modules[id(parameter)])
    return {**saved, "state": state}


def compact(optimizer: torch.optim.Optimizer, module: Trained) -> None:
    """Keep the active entries of state that was loaded in dense form."""
    state = optimizer.state.get(module.value, {})
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.shape == module.dense.shape:
            state[key] = tensor.flatten()[module.position]


def spread(values: Tensor, position: Tensor, like: Tensor) -> Tensor:
    """Return a tensor like `like` with `values` at `position` of its flattened form, zero elsewhere."""
    dense = values.new_zeros(like.numel()).scatter(0, position, values).reshape(like.shape)
    return torch.empty_like(like, dtype=values.dtype, requires_grad=False).copy_(dense)
