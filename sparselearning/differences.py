"""How two states of a model differ."""

from typing import Any

import torch
from torch import Tensor

from sparselearning.compact import is_compact


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return the names of the entries that only one of two states of a model has, or that have other shapes."""
    kinds = [{name: _kind_of(value) for name, value in state.items()} for state in (saved, here)]
    return [name for name in {**kinds[1], **kinds[0]} if kinds[0].get(name) != kinds[1].get(name)]


def describe_differences(names: list[str], saved: dict[str, Any], here: dict[str, Any]) -> str:
    """Say in a line how the entries `names` differ: the first three, and how many more there are."""

    def kind(state, name):
        return _kind_of(state[name]) if name in state else "absent"

    some = [f"{name[:80]} is {kind(saved, name)} in the file and {kind(here, name)} here" for name in names[:3]]
    return "; ".join(some) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def _kind_of(value):
    """Return what an entry of a model and its saved state have in common."""
    if is_compact(value):
        return tuple(value["shape"])
    if not isinstance(value, Tensor):  # what `get_extra_state` returns
        return "no tensor"
    if value.is_meta or value.layout != torch.strided:
        return "a tensor without dense values"
    return f"complex {tuple(value.shape)}" if value.is_complex() else tuple(value.shape)
