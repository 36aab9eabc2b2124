"""Entries of a weight that leave and come.

They are merged some rows at a time, so that what is computed on the way fits into a cache, whatever the layer's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearning.compact import found, positions, rows_of

TOGETHER = 2**17  # entries


class Merged(NamedTuple):
    """The entries that there are after some have left and others come."""

    start: Tensor  # int32, (rows + 1,)
    column: Tensor  # int32, (nonzeros,)
    origin: Tensor  # int32: where each was among the earlier entries, -1 for new ones
    new: Tensor  # int64, ascending: the places of new ones in the flattened weight


def kept_rows(start: Tensor, column: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return start and column of the entries that `kept` (nonzeros,) marks; of all, if it is None."""
    return (start, column) if kept is None else (_starts(start, kept), column[kept])


def merge(start: Tensor, column: Tensor, kept: Tensor | None, grown: Tensor, shape: torch.Size) -> Merged:
    """Return the entries that `kept` marks and those at the places `grown` (int64, ascending), row by row.

    A place that has left and come again is no new one.
    """
    width = shape[1:].numel()
    grown_start, grown_column = rows_of(grown, shape)
    new_start = (start if kept is None else _starts(start, kept)) + grown_start
    size = int(new_start[-1])
    new_column, origin, back = column.new_empty(size), column.new_empty(size), column.new_empty(len(grown))
    for rows in rows_together(start):
        here, there = slice(*start[rows].tolist()), slice(*new_start[rows].tolist())
        coming = slice(*grown_start[rows].tolist())
        first, last = rows
        old = positions(start[first : last + 1], column[here], width)
        new = positions(grown_start[first : last + 1], grown_column[coming], width)
        number = torch.arange(here.start, here.stop, dtype=torch.int32, device=start.device)
        again = found(new, old)
        back[coming] = torch.where(again >= 0, again + here.start, -1).int()
        stays, columns = old, column[here]
        if kept is not None:
            stays, number, columns = old[kept[here]], number[kept[here]], columns[kept[here]]
        place = torch.searchsorted(stays, new) + torch.arange(len(new), device=start.device)
        free = torch.ones(there.stop - there.start, dtype=torch.bool, device=start.device)
        free[place] = False
        new_column[there][place], origin[there][place] = grown_column[coming], back[coming]
        new_column[there][free], origin[there][free] = columns, number
    return Merged(new_start, new_column, origin, grown[back < 0])


def _starts(start, kept):
    return F.pad(kept.cumsum(0, dtype=torch.int32), (1, 0))[start.long()]


def rows_together(start: Tensor) -> Iterator[list[int]]:
    """Yield [first, last] of rows that hold about `TOGETHER` entries, first to last - 1."""
    wanted = torch.tensor(range(TOGETHER, int(start[-1]), TOGETHER), dtype=start.dtype, device=start.device)
    edges = {0, len(start) - 1, *torch.searchsorted(start, wanted).tolist()}
    yield from map(list, pairwise(sorted(edges)))
