"""States of which each process holds a part: gathered whole for a checkpoint, divided again when it is loaded."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparselearning.layers import Layers
from sparselearning.processes.group import Group, current
from sparselearning.processes.sharded import is_sharded, shard_of


def holder_of(part: Any) -> Any:
    """Return what holds the state of a part on this process: the part, or the optimizer in ZeroRedundancyOptimizer."""
    return part.optim if hasattr(part, "consolidate_state_dict") else part


def meshes_in(state: Any) -> set[Any]:
    """Return the meshes of all DTensors in nested dicts and lists."""
    if is_sharded(state):
        return {state.device_mesh}
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return {mesh for value in values for mesh in meshes_in(value)}


def group_of(parts: Iterable[Any], meshes: Iterable[Any]) -> Group | None:
    """Return the processes that hold these parts together: those of a Masking, or else of a mesh; None means all."""
    known = [part.group for part in parts if isinstance(getattr(part, "group", None), Group)]
    if known:
        return known[0]
    largest = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return largest and Group(largest.mesh.flatten().tolist(), largest.get_all_groups(), False)


def whole_state(part: Any) -> Any:
    """Return the whole state of a part on the first process, an empty one on the others; all of them must call it."""
    first = current().rank == 0
    if hasattr(part, "consolidate_state_dict"):
        part.consolidate_state_dict(to=0)
        return part.state_dict() if first else {}
    return gathered(part.state_dict(), first)


def gathered(state: Any, keep: bool) -> Any:
    """Return a state with every DTensor whole and on the CPU, one after the other; None in its place unless `keep`."""
    if is_sharded(state):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def divided(state: Any, part: Any) -> Any:
    """Return a whole state with the tensors that a part holds as DTensors divided like these."""
    if isinstance(part, Layers):
        return state  # it divides the state itself
    if not isinstance(part, torch.optim.Optimizer):
        own = part.state_dict()
        return _like(state, own) if meshes_in(own) else state
    if not any(is_sharded(weight) for group in part.param_groups for weight in group["params"]):
        return state
    weights = {}
    for saved, here in zip(state["param_groups"], part.param_groups, strict=False):
        weights |= dict(zip(saved["params"], here["params"], strict=False))
    states = {index: _entries_like(entries, weights.get(index)) for index, entries in state["state"].items()}
    return {**state, "state": states}


def _like(state, own):
    if is_sharded(own) and isinstance(state, Tensor) and not is_sharded(state) and state.shape == own.shape:
        return shard_of(state, own)
    if isinstance(state, dict) and isinstance(own, dict):
        return type(state)((key, _like(value, own.get(key))) for key, value in state.items())
    return state


def _entries_like(entries, weight):
    if not is_sharded(weight) or not isinstance(entries, dict):
        return entries
    return {key: _like(value, weight) for key, value in entries.items()}


def snapshot(part: Any) -> Callable[[], None]:
    """Return a function that gives a part the state back that it has now."""
    holder = holder_of(part)
    state = copy.deepcopy(holder.state_dict())
    return lambda: holder.load_state_dict(state)
