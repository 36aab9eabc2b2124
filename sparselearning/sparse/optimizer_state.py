"""What an optimizer keeps for the active values of layers that train on sparse kernels.

It is as long as the values. A state_dict holds it in dense form, zero where weights are inactive, so that it is the
same as that of masked or dense training; in a checkpoint it is compact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparselearning.compact import COMPACT, found, is_compact, places_of, position_of
from sparselearning.compact import in_dense_form as dense_state
from sparselearning.sparse.entries import moved
from sparselearning.sparse.held import Held
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


def group_of(optimizer: torch.optim.Optimizer, module: Held) -> dict[str, Any]:
    """Return the optimizer's settings for a layer; `maximize` among them."""
    return {"maximize": False, **start_states.group_of(optimizer, module.value)}


def momentum_gain(optimizer: torch.optim.Optimizer, module: Held) -> float:
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
    module: Held,
    origin: Tensor,
    mean: Tensor | None,
    start: str | None,
    copies: Collection[str],
) -> None:
    """Let the state of the values follow entries that moved, and start that of weights that have grown.

    It starts as `start_of_state` says. If `start` is None, SGD's momentum starts as if the mean of the observed
    gradients had been the gradient all along, and all else as with 'zero'.

    Args:
        origin: where each entry was among the earlier ones, -1 for new ones; int32, (nonzeros,).
        mean: mean gradients of new entries in their order, if any were observed.
    """
    state, new = optimizer.state.get(module.value, {}), origin < 0
    entries = {
        key: item for key, item in state.items() if isinstance(item, Tensor) and item.dim() == 1 and key != "step"
    }
    if not entries:
        return
    group = start_states.group_of(optimizer, module.value)
    stays = torch.zeros(len(next(iter(entries.values()))), dtype=torch.bool)
    stays[origin[~new].long()] = True
    starts = start_states.start_of_state(start or "zero", entries, stays, group, copies)
    gain = momentum_gain(optimizer, module)
    for key in entries:
        state[key] = item = moved(entries[key], origin)
        if start is None and key == "momentum_buffer" and mean is not None:
            item[new] = (mean * gain).to(item)
        elif isinstance(starts[key], Tensor) or starts[key] != 0:
            item[new] = starts[key]


def in_dense_form(state: Mapping[Any, Any], module: Held) -> dict[Any, Any]:
    """Return the state of a layer's values, with tensors of its weight's shape."""
    return {**state} | {key: module.entries.spread(tensor) for key, tensor in vectors(state, len(module.value)).items()}


def save(optimizer: torch.optim.Optimizer, saved: dict[str, Any], trained: Mapping[str, Held]) -> dict[str, Any]:
    """Return the optimizer's state_dict `saved` with the state of `trained` layers in dense form.

    For a checkpoint it stays as it is, beside the places of its entries; see compact.py.
    """
    modules = {id(module.value): module for module in trained.values()}
    state = dict(saved["state"])
    for number, parameter in numbered(optimizer, saved):
        module = modules.get(id(parameter))
        if module is not None and number in state:
            compact(optimizer, module)
            own = optimizer.state[parameter]
            places = {"active": places_of(module.entries)}
            state[number] = {**own, **places} if COMPACT.get() else in_dense_form(own, module)
    return {**saved, "state": state}


def numbered(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Yield the number of each parameter in a state_dict of the optimizer, and the parameter."""
    for numbers, group in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        yield from zip(numbers["params"], group["params"], strict=False)


def arriving(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], trained: Mapping[str, Held]
) -> tuple[dict[str, Any], list[tuple[Held, Tensor]]]:
    """Return a state_dict without the places of entries, and for each layer where the entries of its state are."""
    modules = {id(module.value): module for module in trained.values()}
    state, places = dict(saved["state"]), []
    for number, parameter in numbered(optimizer, saved):
        entry = state.get(number)
        if isinstance(entry, dict) and is_compact(entry.get("active")):
            module = modules.get(id(parameter))
            if module is None:
                state[number] = dense_state(entry, entry["active"])
                continue
            places.append((module, position_of(entry["active"])))
            state[number] = {key: item for key, item in entry.items() if key != "active"}
    return {**saved, "state": state}, places


def compact(optimizer: torch.optim.Optimizer, module: Held) -> None:
    """Keep the entries of loaded state that are active here: it may be dense, or of other entries."""
    state, position = optimizer.state.get(module.value, {}), None
    loaded, module.loaded = module.loaded, None
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.dim() > 0 and tensor.shape == module.entries.shape:
            position = module.entries.position if position is None else position
            state[key] = tensor.flatten()[position]
        elif loaded is not None and tensor.shape == loaded.shape:
            there = found(module.entries.position, loaded)
            state[key] = torch.where(there >= 0, tensor[there.clamp(min=0)], 0) if len(loaded) else tensor
