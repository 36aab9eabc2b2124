"""Which inactive entries of a weight become active, where nothing of the weight's dense size may exist.

A weight of shape (rows, ...), flattened to (rows, width), holds its active entries as `start` (rows + 1,) and `column`
(nonzeros,), ascending within a row. A position (int64) is row * width + column. The functions take memory for the
nonzeros, for what they return and for one block of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparselearning.compact import positions
from sparselearning.selection import CHUNK, SAMPLE

BLOCK_BYTES = 32 << 20
LARGEST = 8  # bytes of a number in a gradient


def highest_inactive(
    gradient_rows: Callable[[int, int], Tensor],
    start: Tensor,
    column: Tensor,
    width: int,
    k: int,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return positions (ascending) and gradients of the k inactive entries whose |gradient| is highest.

    They are those that `selection.add_highest` adds for the whole |gradient|: of equals the first come first, NaN ranks
    lowest, and if fewer than k entries are inactive, all are returned. `gradient_rows(first, last)` returns the
    gradient of the rows from `first` to `last` - 1, (last - first, width). It is called once for each block of rows, in
    order; a block takes at most `block_bytes` (by default `BLOCK_BYTES`), or is one row.
    """
    rows, best = len(start) - 1, Best(k, start.device)
    step = max(1, (block_bytes or BLOCK_BYTES) // (max(width, 1) * LARGEST))
    for first in range(0, rows if k > 0 else 0, step):
        last = min(first + step, rows)
        ends = start[first : last + 1]
        active = positions(ends, column[int(ends[0]) : int(ends[-1])], width)
        best.offer(first * width, gradient_rows(first, last).detach().flatten(), active)
        best.forget_lower()
    return best.chosen()


class Best:
    """The k best of the entries offered so far, and for a while some that came before better ones."""

    def __init__(self, k: int, device: torch.device):
        self.k, self.threshold, self.size = k, -math.inf, 0  # k entries have at least the threshold
        self.position = [torch.empty(0, dtype=torch.int64, device=device)]
        self.gradient: list[Tensor] = []

    def offer(self, offset: int, gradient: Tensor, active: Tensor) -> None:
        """Take a block of entries that come after all earlier ones, from position `offset` on; not the `active`."""
        guess = probably_below(gradient, active, self.k)
        found = above(max(guess, self.threshold), gradient, active)
        if guess > self.threshold and len(found) < self.k:
            found = best_inactive(gradient, active, self.k)
        self.gradient.append(gradient[found])
        self.position.append(found.add_(offset))
        self.size += len(found)

    def forget_lower(self) -> None:
        """Keep the k best alone, if there are twice as many; not while a block of gradients exists, for memory."""
        if self.size >= 2 * self.k:
            position, best = self.chosen()
            self.position, self.gradient, self.size = [position], [best], self.k
            self.threshold = without_nan(best.abs()).min().item()

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Return positions and gradients of the k best."""
        position = torch.cat(self.position)
        gradient = torch.cat(self.gradient) if self.gradient else torch.empty(0, device=position.device)
        return best_of(position, gradient, self.k)


def probably_below(gradient: Tensor, active: Tensor, k: int) -> float:
    """Return a magnitude that more than k inactive entries exceed, as a sample of them says; it may be wrong."""
    step = len(gradient) // SAMPLE | 1  # odd: many rows have a power of two entries
    if step == 1:
        return -math.inf
    sampled = torch.arange(0, len(gradient), step, device=gradient.device)
    sampled = sampled[~is_among(sampled, active)]
    share = k / max(len(gradient) - len(active), 1)
    rank = share * len(sampled)
    rank = int(rank + 4 * rank**0.5 + 8)
    return kth_highest(without_nan(gradient[sampled].abs()), rank) if rank <= len(sampled) else -math.inf


def best_inactive(gradient: Tensor, active: Tensor, k: int) -> Tensor:
    """Return which k inactive entries of a block have the largest magnitude; where many are zero, no list of all."""
    score = without_nan(gradient.abs()).index_fill_(0, active, -math.inf)
    if k >= len(gradient) - len(active):
        return indices_of(score > -math.inf)
    kth = kth_highest(score, k)
    chosen = score > kth
    tied = indices_of(score == kth)[: k - int(chosen.count_nonzero())]
    chosen[tied] = True
    return indices_of(chosen)


def above(limit: float, gradient: Tensor, active: Tensor) -> Tensor:
    """Return which entries are inactive and have a magnitude above the limit, where NaN counts as -1."""
    parts = gradient.split(CHUNK if gradient.device.type == "cpu" else max(len(gradient), 1))
    ends = torch.arange(len(parts) + 1, device=active.device) * len(parts[0])
    edges = torch.searchsorted(active, ends).tolist()
    scores = torch.empty_like(parts[0])  # of every part in the same memory
    found = []
    for i, part in enumerate(parts):
        score, begin = torch.abs(part, out=scores[: len(part)]), i * len(parts[0])
        if limit < -1:  # NaN exceeds no other limit, with or without this
            score = without_nan(score)
        score.index_fill_(0, active[edges[i] : edges[i + 1]] - begin, -math.inf)
        found.append(indices_of(score > limit) + begin)
    return torch.cat(found)


def best_of(position: Tensor, gradient: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k entries whose |gradient| is highest, by the rules of `highest_inactive`; positions are ascending.

    >>> best_of(torch.tensor([3, 5, 8, 9]), torch.tensor([1.0, -4.0, torch.nan, 1.0]), 2)
    (tensor([3, 5]), tensor([ 1., -4.]))
    """
    if k >= len(position):
        return position, gradient
    if k <= 0:
        return position[:0], gradient[:0]
    score = without_nan(gradient.abs())
    kth = kth_highest(score, k)
    chosen, tied = score > kth, score == kth
    end = indices_of(tied)[k - int(chosen.count_nonzero()) - 1] + 1
    chosen[:end] |= tied[:end]
    found = indices_of(chosen)
    return position[found], gradient[found]


def without_nan(magnitude: Tensor) -> Tensor:
    """Return magnitudes with -1 for NaN, below every number."""
    return magnitude.nan_to_num_(nan=-1, posinf=math.inf)


def kth_highest(score: Tensor, k: int) -> float:
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.topk(k).values.min().item()
    values = score.numpy().copy()
    values.partition(values.size - k)
    return values[values.size - k].item()


def indices_of(marks: Tensor) -> Tensor:
    """Return where a vector of bool is True; numpy is several times faster than torch on a CPU."""
    return torch.from_numpy(np.flatnonzero(marks.numpy())) if marks.device.type == "cpu" else marks.nonzero().flatten()


def is_among(position: Tensor, ascending: Tensor) -> Tensor:
    """Return which positions are among those of the other, which are ascending."""
    if not len(ascending):
        return torch.zeros_like(position, dtype=torch.bool)
    place = torch.searchsorted(ascending, position).clamp_(max=len(ascending) - 1)
    return ascending[place] == position


def inactive_of(position: Tensor, start: Tensor, column: Tensor, width: int) -> Tensor:
    """Return those of the positions that are inactive, in the order given."""
    return position[~is_among(position, positions(start, column, width))]


def indices_at(position: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return ascending positions as `start` (rows + 1,) and `column`, int32: the inverse of `positions`.

    >>> indices_at(torch.tensor([1, 2, 7]), rows=2, width=4)
    (tensor([0, 2, 3], dtype=torch.int32), tensor([1, 2, 3], dtype=torch.int32))
    """
    ends = torch.arange(rows + 1, device=position.device) * width
    return torch.searchsorted(position, ends, out_int32=True), (position % max(width, 1)).int()


def random_inactive(
    start: Tensor, column: Tensor, width: int, k: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return the positions (ascending) of k inactive entries at random, each set of k with the same chance.

    If fewer than k entries are inactive, all are returned.
    """
    return random_outside(positions(start, column, width), (len(start) - 1) * width, k, generator)


def random_outside(taken: Tensor, size: int, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Return k positions (ascending) below `size` at random, none of those that are `taken` (ascending)."""
    rank = random_subset(size - len(taken), k, taken.device, generator)
    # A position that is free has the rank: positions that are free before it. Before taken[i] there are taken[i] - i.
    free_before = taken - torch.arange(len(taken), device=taken.device)
    return rank + torch.searchsorted(free_before, rank, right=True)


def random_subset(size: int, k: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Return k of the numbers below `size` (ascending) at random, each set of k with the same chance; all if fewer."""
    k = max(min(k, size), 0)
    if size <= 4 * k:
        return torch.randperm(size, device=device, generator=generator)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64, device=device)
    while len(found) < k:
        more = torch.randint(size, ((k - len(found)) * 5 // 4 + 32,), device=device, generator=generator)
        found = torch.cat([found, more]).unique()
    # All sets of this length had the same chance, and so have all their subsets of k.
    kept = torch.randperm(len(found), device=device, generator=generator)[:k]
    return found[kept.sort().values]
