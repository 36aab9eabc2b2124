"""States without zeros: what a checkpoint holds of weights, masks and optimizer states of which few entries are active.

    {"value": (nonzeros,), "start": int32 (rows + 1,), "column": int32 (nonzeros,), "shape": [rows, ...]}

stands for a dense tensor. Without "value" it is a mask. An optimizer's state of a weight has such a mask as "active",
and tensors of (nonzeros,) beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

COMPACT = ContextVar("COMPACT", default=False)  # whether states are made so
PLACES = {"start", "column", "shape"}


@contextmanager
def compactly() -> Iterator[None]:
    """Let layers and optimizers that hold active entries alone return such states."""
    token = COMPACT.set(True)
    try:
        yield
    finally:
        COMPACT.reset(token)


def positions(start: Tensor, column: Tensor, width: int) -> Tensor:
    """Return where the nonzeros of a weight lie when it is flattened, int64; a row of it has `width` entries."""
    rows = start.diff().long()
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)
    return row.mul_(width).add_(column)


def rows_of(position: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return start and column, int32, of entries at these places, in ascending order, of a weight of this shape."""
    width = max(math.prod(shape[1:]), 1)
    ends = torch.arange(shape[0] + 1, device=position.device) * width
    return torch.searchsorted(position, ends, out_int32=True), position.remainder(width).int()


def found(wanted: Tensor, among: Tensor) -> Tensor:
    """Return where each number of `wanted` is in `among`, both ascending and of different numbers; -1 if it is not.

    >>> found(torch.tensor([1, 4, 9]), torch.tensor([4, 5, 9]))
    tensor([-1,  0,  2])
    """
    if not len(among):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(among, wanted).clamp_(max=len(among) - 1)
    return torch.where(among[place] == wanted, place, -1)


def compact(position: Tensor, shape: torch.Size, value: Tensor | None = None) -> dict[str, Any]:
    """Return the compact form of a mask, or of a weight with these values."""
    start, column = rows_of(position, shape)
    return ({} if value is None else {"value": value}) | {"start": start, "column": column, "shape": list(shape)}


def places_of(entries: Any) -> dict[str, Any]:
    """Return the compact form of the mask of a layer's entries (sparse/entries.py)."""
    return {"start": entries.start, "column": entries.column, "shape": list(entries.shape)}


def weight_of(entries: Any) -> dict[str, Any]:
    """Return the compact form of a weight, with what was written where none is active."""
    value = entries.value.detach()
    if entries.beyond is None:
        return {"value": value, **places_of(entries)}
    position, order = torch.cat([entries.position, entries.beyond[0]]).sort()
    return compact(position, entries.shape, torch.cat([value, entries.beyond[1]])[order])


def is_compact(item: Any) -> bool:
    """Return whether this is a weight or a mask in compact form."""
    return isinstance(item, dict) and item.keys() - {"value"} == PLACES


def position_of(item: Mapping[str, Any]) -> Tensor:
    """Return where the entries are in the flattened tensor, int64."""
    return positions(item["start"], item["column"], math.prod(item["shape"][1:]))


def dense_of(item: Mapping[str, Any], value: Tensor | None = None) -> Tensor:
    """Return the dense tensor that it stands for; a mask if it has no values and none are given."""
    value = item.get("value", value)
    value = torch.ones(len(item["column"]), dtype=torch.bool) if value is None else value
    return value.new_zeros(math.prod(item["shape"])).scatter(0, position_of(item), value).reshape(item["shape"])


def in_dense_form(state: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state of one weight in dense form, from one with `active` places `item`."""
    size = (len(item["column"]),)
    return {
        key: dense_of(item, value) if isinstance(value, Tensor) and value.shape == size else value
        for key, value in state.items()
        if key != "active"
    }


def expanded(state: Any) -> Any:
    """Return a state in which every compact form is dense."""
    if is_compact(state):
        return dense_of(state)
    if isinstance(state, dict):
        state = in_dense_form(state, state["active"]) if is_compact(state.get("active")) else state
        return type(state)((key, expanded(value)) for key, value in state.items())
    if isinstance(state, list | tuple):
        return type(state)(expanded(value) for value in state)
    return state
