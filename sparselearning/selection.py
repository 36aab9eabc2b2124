"""The two verbs and the divider that every method is made of.

Selection is exact: k asked for is k moved, and of equal scores the entry that comes first in row-major
order (whatever the memory layout) is dropped or added first. A score of NaN ranks below every number.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def drop_lowest(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return `mask` without the k active entries whose score is lowest.

    `score` and `mask` (bool) have the same shape; with fewer than k active entries all are dropped.

    >>> drop_lowest(torch.tensor([3., 1., 2., 0.]), torch.tensor([True, True, True, False]), 1)
    tensor([ True, False,  True, False])
    """
    return drop_lowest_jointly([score], [mask], k)[0]


def add_highest(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return `mask` with the k inactive entries whose score is highest.

    `score` and `mask` (bool) have the same shape; with fewer than k inactive entries all are added.

    >>> add_highest(torch.tensor([3., 1., 2., 0.]), torch.tensor([True, False, False, False]), 1)
    tensor([ True, False,  True, False])
    """
    return add_highest_jointly([score], [mask], k)[0]


def drop_lowest_jointly(scores: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Drop the k lowest active entries of all masks together, one budget for the whole network."""
    lowest = _mark_lowest(scores, masks, k, negate=False)
    return [mask & ~low for mask, low in zip(masks, lowest, strict=True)]


def add_highest_jointly(scores: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Add the k highest inactive entries of all masks together, one budget for the whole network."""
    highest = _mark_lowest(scores, [~mask for mask in masks], k, negate=True)
    return [mask | high for mask, high in zip(masks, highest, strict=True)]


def _mark_lowest(scores, candidates, k, *, negate) -> list[Tensor]:
    """Mark the k candidates of lowest score (highest, if `negate`), earlier entries first among equals."""
    if k <= 0:
        return [torch.zeros_like(among) for among in candidates]
    scores = [score.detach() if score.dtype in (torch.float32, torch.float64) else score.detach().float()
              for score in scores]  # fmt: skip
    on_cpu = all(score.device.type == "cpu" for score in scores)
    return (_mark_lowest_on_cpu if on_cpu else _mark_lowest_on_device)(scores, candidates, k, negate)


def _mark_lowest_on_cpu(scores, candidates, k, negate):
    # numpy's partition is a vectorised quickselect, several times faster than torch.kthvalue or topk here.
    values = [score.numpy()[among.numpy()] for score, among in zip(scores, candidates, strict=True)]
    sizes = [value.size for value in values]
    joint = values[0] if len(values) == 1 else np.concatenate(values)
    if k >= joint.size:
        return [among.clone() for among in candidates]
    if negate:
        np.negative(joint, out=joint)
    if np.isnan(joint.max()):  # max() is NaN if any value is
        joint[np.isnan(joint)] = np.inf if negate else -np.inf
    kth = np.partition(joint, k - 1)[k - 1]
    low = joint < kth
    tied = np.flatnonzero(joint == kth)
    low[tied[: k - np.count_nonzero(low)]] = True
    marks = [torch.zeros_like(among) for among in candidates]
    for mark, among, part in zip(marks, candidates, np.split(low, np.cumsum(sizes)[:-1]), strict=True):
        mark.numpy()[among.numpy()] = part
    return marks


def _mark_lowest_on_device(scores, candidates, k, negate):
    """The same without waiting for the device: no value or count is read on the host."""
    device = scores[0].device
    values = torch.cat([(-score if negate else score).flatten().to(device) for score in scores])
    values = values.nan_to_num(nan=torch.inf if negate else -torch.inf, posinf=torch.inf, neginf=-torch.inf)
    among = torch.cat([among.flatten().to(device) for among in candidates])
    values.masked_fill_(~among, torch.inf)
    kth = values.topk(min(k, values.numel()), largest=False, sorted=False).values.max()
    low = among & (values < kth)
    tied = among & (values == kth)
    low |= tied & (tied.cumsum(0) <= k - low.sum())
    parts = low.split([among.numel() for among in candidates])
    return [part.view(among.shape).to(among.device) for part, among in zip(parts, candidates, strict=True)]


def apportion(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Divide `total` units among parts in proportion to `shares`, at most `capacity[i]` to part i.

    Largest remainder method, of equal remainders the earlier part first. What a full part cannot take
    goes to the others in proportion to their shares; parts whose shares are all zero count as equal.

    >>> apportion(10, shares=[1, 1, 2], capacity=[9, 9, 3])
    [4, 3, 3]

    Raises:
        ValueError: if a share is negative or not finite, or the parts cannot hold `total`.
    """
    share = np.asarray(shares, dtype=np.float64)
    room = np.asarray(capacity, dtype=np.int64)
    if not (np.isfinite(share).all() and (share >= 0).all()):
        raise ValueError(f"Shares must be finite and not negative, got {list(shares)}.")
    if not 0 <= total <= room.sum():
        raise ValueError(f"Cannot place {total} units in parts that hold {room.sum()}.")
    counts = np.zeros_like(room)
    open_ = room > 0
    left = total
    while left:
        weight = np.where(open_, share, 0)
        if not weight.any():
            weight = open_.astype(np.float64)
        weight = weight / weight.max()  # the sum of very large shares would overflow
        quota = left * (weight / weight.sum())
        full = open_ & (quota >= room)
        if not full.any():
            # A hair less, so that rounding errors never make the floors exceed what is left.
            floor = np.floor(quota * (1 - 1e-12)).astype(np.int64)
            # Remainders that differ by rounding errors alone are equal.
            by_remainder = np.argsort(np.round(floor - quota, 9), kind="stable")
            by_remainder = by_remainder[open_[by_remainder]]
            counts += floor
            counts[by_remainder[: left - floor.sum()]] += 1
            break
        counts[full] = room[full]
        left -= int(room[full].sum())
        open_ &= ~full
    return counts.tolist()
