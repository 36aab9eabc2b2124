"""Entries of a weight that leave and come.

They are merged some rows at a time, so that what is computed on the way fits into a cache, whatever the layer's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearning.compact import rows_of

TOGETHER = 2**14  # entries


class Merged(NamedTuple):
    """The entries that there are after some have left and others come."""

    start: Tensor  # int32, (rows + 1,)
    column: Tensor  # int32, (nonzeros,)
    origin: Tensor  # int32: where each was among the earlier entries, -1 for new ones
    new: Tensor  # int64, ascending: the places of new ones in the flattened weight


def kept_rows(start: Tensor, column: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return start and column of the entries that `kept` (nonzeros,) marks; of all, if it is None."""
    return (start, column) if kept is None else (_starts(start, kept), column[kept])


def _starts(start, kept):
    return F.pad(kept.cumsum(0, dtype=torch.int32), (1, 0))[start.long()]


def merge(start: Tensor, column: Tensor, kept: Tensor | None, grown: Tensor, shape: torch.Size) -> Merged:
    """Return the entries that `kept` marks and those at the places `grown` (int64, ascending), row by row.

    A place that has left and come again is no new one.
    """
    grown_start, grown_column = rows_of(grown, shape)
    new_start = (start if kept is None else _starts(start, kept)) + grown_start
    size = int(new_start[-1])
    merged = column.new_empty(size), column.new_empty(size), column.new_empty(len(grown))
    kept = torch.ones_like(column, dtype=torch.bool) if kept is None else kept
    parts = (start, column, kept, grown_start, grown_column, new_start)
    # numpy selects by masks several times faster than torch on a CPU.
    arrays = [part.cpu().numpy() for part in (*parts, *merged)]
    for first, last in rows_together(arrays[0]):
        _merge_rows(first, last, shape[1:].numel(), *arrays)
    new_column, origin, back = (torch.from_numpy(array).to(start.device) for array in arrays[len(parts) :])
    return Merged(new_start, new_column, origin, grown[back < 0])


def _merge_rows(first, last, width, start, column, kept, grown_start, grown_column, new_start, to_column, origin, back):
    """Write the entries of some rows; `back` says where grown ones were among the earlier entries, or -1."""
    here, coming, there = (slice(x[first], x[last]) for x in (start, grown_start, new_start))
    old = _places(start[first : last + 1], column[here], width)
    new = _places(grown_start[first : last + 1], grown_column[coming], width)
    at, stays = np.searchsorted(old, new), kept[here]
    again = np.zeros(len(new), dtype=bool)
    again[at < len(old)] = old[at[at < len(old)]] == new[at < len(old)]
    back[coming] = np.where(again, at + here.start, -1)
    place = np.concatenate([[0], np.cumsum(stays)])[at] + np.arange(len(new))  # among those that stay and come
    free = np.ones(there.stop - there.start, dtype=bool)
    free[place] = False
    to_column[there][place], origin[there][place] = grown_column[coming], back[coming]
    to_column[there][free], origin[there][free] = column[here][stays], np.flatnonzero(stays) + here.start


def _places(start, column, width):
    return np.repeat(np.arange(len(start) - 1) * width, np.diff(start)) + column


def rows_together(start: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of rows that hold about `TOGETHER` entries, first to last - 1."""
    edges = {0, len(start) - 1, *np.searchsorted(start, np.arange(TOGETHER, start[-1], TOGETHER)).tolist()}
    yield from pairwise(sorted(edges))
