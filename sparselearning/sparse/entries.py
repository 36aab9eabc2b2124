"""The active entries of a weight: their values, and where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparselearning.compact import found, positions, rows_of
from sparselearning.sparse.interface import MOST
from sparselearning.sparse.merging import Merged, merge

Turned = tuple[Tensor, Tensor, Tensor]  # t_start, t_column, t_order


class Entries:
    """The active entries of a weight of some shape, row by row of its matrix (rows, width).

    The optimizer steps `value` (nonzeros,). Row r has the values start[r] to start[r + 1], at the places `column` of
    the row; both are int32. `turned` are the same entries in the order of the input gradient. Nothing here is as large
    as the weight, but what `dense` and `mask` compute.

    Args:
        shape: of the weight.
        value: of the entries, (nonzeros,).
        position: of the entries in the flattened weight, ascending.
        turn: function from (start, column) to `turned`.
    """

    def __init__(self, shape: torch.Size, value: Tensor, position: Tensor, turn: Callable[[Tensor, Tensor], Turned]):
        self.shape, self.turn = torch.Size(shape), turn
        self.value = nn.Parameter(value.detach(), value.requires_grad)
        self.value.full_shape = tuple(shape)  # pyright: ignore[reportAttributeAccessIssue]
        self.beyond: tuple[Tensor, Tensor] | None = None  # places and values that were written where none is active
        self.place(position)

    @property
    def width(self) -> int:
        """Entries in a row."""
        return self.shape[1:].numel()

    @property
    def position(self) -> Tensor:
        """Return where each entry is in the flattened weight, int64."""
        return positions(self.start, self.column, self.width)

    def place(self, position: Tensor) -> None:
        """Say where the entries are."""
        if len(position) > MOST:
            raise ValueError(f"Expected at most {MOST} active weights in a layer, got {len(position)}.")
        self.start, self.column = rows_of(position, self.shape)
        self.turned = self.turn(self.start, self.column)

    @torch.no_grad()
    def move(self, kept: Tensor | None, grown: Tensor) -> Merged:
        """Keep the entries that `kept` (nonzeros,) marks, and have others at the places `grown`, which are zero."""
        merged = merge(self.start, self.column, kept, grown, self.shape)
        value = moved(self.value.detach(), merged.origin)
        if self.beyond is not None and len(merged.new):
            there = found(merged.new, self.beyond[0])
            value[merged.origin < 0] = torch.where(there >= 0, self.beyond[1][there.clamp(min=0)], 0)
        self.beyond = None
        self.set_value(value)
        self.start, self.column = merged.start, merged.column
        self.turned = self.turn(self.start, self.column)
        return merged

    @torch.no_grad()
    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change dtype or device, as nn.Module's `_apply` does."""
        gradient = self.value.grad
        self.value.grad = None
        self.value.data = function(self.value.data)
        self.value.grad = None if gradient is None else function(gradient)
        self.start, self.column, *self.turned = map(function, (self.start, self.column, *self.turned))
        if self.beyond is not None:
            self.beyond = function(self.beyond[0]), function(self.beyond[1])

    def set_value(self, value: Tensor) -> None:
        """Take other values, as many as there will be entries; the parameter stays the same object."""
        if value.shape == self.value.shape and value.dtype == self.value.dtype:
            self.value.data.copy_(value)
            return
        # Where the caller still holds the loss of the last step, its graph would expect gradients of the size that
        # there was. Only another dtype makes torch forget that.
        self.value.data = value.new_empty(0, dtype=torch.float16 if value.dtype != torch.float16 else torch.float32)
        self.value.data = value

    def mask(self) -> Tensor:
        """Return which weights are active, bool and dense."""
        mask = torch.zeros(self.shape.numel(), dtype=torch.bool, device=self.value.device)
        mask[self.position] = True
        return mask.reshape(self.shape)

    def spread(self, value: Tensor) -> Tensor:
        """Return a dense tensor with a number for each entry, and zeros."""
        return value.new_zeros(self.shape.numel()).scatter(0, self.position, value).reshape(self.shape)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight, with what was written where none is active."""
        weight = self.spread(self.value.detach())
        if self.beyond is not None:
            weight.view(-1)[self.beyond[0]] = self.beyond[1]
        return weight

    @torch.no_grad()
    def load(self, position: Tensor, value: Tensor) -> None:
        """Take a weight with these entries, which stay where none is active until the next step."""
        own = found(self.position, position)
        values = torch.where(own >= 0, value[own.clamp(min=0)], 0) if len(position) else self.value * 0
        self.value.copy_(values)
        rest = (found(position, self.position) < 0) & (value != 0)
        self.beyond = (position[rest], value[rest].to(self.value)) if rest.any() else None

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Take what is in a dense weight; what lies where no weight is active stays until the next step."""
        flat, position = weight.detach().to(self.value).flatten(), self.position
        values = flat[position]
        if not torch.equal(values, self.value):
            self.value.copy_(values)
        rest = flat.index_fill(0, position, 0).nonzero().flatten()
        self.beyond = (rest, flat[rest]) if len(rest) else None


def moved(tensor: Tensor, origin: Tensor) -> Tensor:
    """Return the numbers of a tensor at `origin`, int32, and zero where that is -1."""
    if not len(tensor):
        return tensor.new_zeros(len(origin))
    return tensor.index_select(0, origin.clamp(min=0)).masked_fill_(origin < 0, 0)
