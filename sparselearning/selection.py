"""Drop the lowest, add the highest, and apportion: the three functions that every method is made of.

Selection is exact: exactly k entries move. Of equal scores, the entry that comes first in row-major order (in any
memory layout) is dropped or added first. A score of NaN ranks below every number.

A mask that carries a pattern (patterns.py) moves in the pattern's units. A unit's score is the sum of its weights'
scores. The units dropped hold at least k weights, the units added at most k; a full group gets no unit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparselearning.patterns import UNSTRUCTURED, ablate, pattern_of
from sparselearning.processes import selecting
from sparselearning.processes.sharded import is_sharded

SAMPLE = 1 << 14  # entries that bounds are estimated from
CHUNK = 1 << 18  # entries that fit into the cache of a core


def drop_lowest(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return `mask` without the k active entries whose scores are lowest.

    `score` and `mask` (bool) have the same shape. If fewer than k entries are active, all are dropped.

    >>> drop_lowest(torch.tensor([3., 1., 2., 0.]), torch.tensor([True, True, True, False]), 1)
    tensor([ True, False,  True, False])
    """
    return drop_lowest_jointly([score], [mask], k)[0]


def add_highest(score: Tensor, mask: Tensor, k: int) -> Tensor:
    """Return `mask` with the k inactive entries whose scores are highest.

    `score` and `mask` (bool) have the same shape. If fewer than k entries are inactive, all are added.

    >>> add_highest(torch.tensor([3., 1., 2., 0.]), torch.tensor([True, False, False, False]), 1)
    tensor([ True, False,  True, False])
    """
    return add_highest_jointly([score], [mask], k)[0]


def drop_lowest_jointly(scores: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks without the k lowest active entries of all of them: one budget for the whole network."""
    patterns, size, scores, active = _in_units(scores, masks)
    lowest = _mark_lowest(scores, active, -(-k // size), negate=False)
    return [
        mask & pattern.weights(low.logical_not_(), mask)
        for pattern, mask, low in zip(patterns, masks, lowest, strict=True)
    ]


def add_highest_jointly(scores: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return the masks with the k highest inactive entries of all of them: one budget for the whole network."""
    patterns, size, scores, active = _in_units(scores, masks)
    kept: list[Tensor | None] = [None] * len(patterns)
    if any(pattern.ablation for pattern in patterns):
        for i, pattern in enumerate(patterns):
            if pattern.ablation:
                active[i], kept[i] = _ablated(pattern, scores[i], active[i])
        masks = active
        k = sum(pattern.capacity(mask.shape) - int(mask.sum()) for pattern, mask in zip(patterns, masks, strict=True))
    candidates = [
        pattern.candidates(score, mask, left)
        for pattern, score, mask, left in zip(patterns, scores, active, kept, strict=True)
    ]
    highest = _mark_lowest(scores, candidates, k // size, negate=True)
    return [mask | pattern.weights(high, mask) for pattern, mask, high in zip(patterns, masks, highest, strict=True)]


def _in_units(scores, masks):
    """Return the pattern of each mask, the size of their units, and the scores and masks of the units."""
    patterns = [pattern_of(mask) for mask in masks]
    sizes = {pattern.size for pattern in patterns}
    if len(sizes) > 1:
        raise ValueError(f"Units of {sorted(sizes)} weights cannot be selected jointly. Select layer by layer.")
    units = [
        score if pattern == UNSTRUCTURED else pattern.units(_as_float(score))
        for pattern, score in zip(patterns, scores, strict=True)
    ]
    active = [pattern.units(mask) for pattern, mask in zip(patterns, masks, strict=True)]
    return patterns, max(sizes, default=1), units, [part if part.dtype == torch.bool else part > 0 for part in active]


def _ablated(pattern, score, mask):
    """Return a mask of constant fan-in without the neurons that its pattern removes, and which are kept."""
    lacking = pattern.capacity(mask.shape) - int(mask.sum())
    (wanted,) = _mark_lowest([score], [torch.ones_like(mask)], lacking, negate=True)
    return ablate(pattern, mask, score, wanted)


def _as_float(score):
    return score.detach() if score.dtype in (torch.float32, torch.float64) else score.detach().float()


def _mark_lowest(scores, candidates, k, *, negate) -> list[Tensor]:
    """Mark the k candidates with the lowest scores (highest, if `negate`); of equals, earlier entries first."""
    if k <= 0:
        return [torch.zeros_like(among) for among in candidates]
    if any(map(is_sharded, candidates)):
        return selecting.mark_lowest(scores, candidates, k, negate=negate)
    scores = [_as_float(score) for score in scores]
    on_cpu = all(score.device.type == "cpu" for score in scores)
    return (_mark_lowest_on_cpu if on_cpu else _mark_lowest_on_device)(scores, candidates, k, negate)


def _mark_lowest_on_cpu(scores, candidates, k, negate):
    # numpy's partition is a vectorised quickselect, several times faster than torch.kthvalue or topk on a CPU.
    marks = [torch.empty_like(among) for among in candidates]
    scores = [_without_nan(_laid_out_as(mark, score)) for mark, score in zip(marks, scores, strict=True)]
    score, mark = [_flat(part) for part in scores], [_flat(part) for part in marks]
    among = [_flat(_laid_out_as(part, tensor)) for part, tensor in zip(marks, candidates, strict=True)]
    size = sum(map(np.count_nonzero, among))
    if k >= size:
        return [tensor.clone() for tensor in candidates]
    kth = _kth_best(score, among, k, size, highest=negate)
    for i in range(len(mark)):
        (np.greater_equal if negate else np.less_equal)(score[i], kth, out=mark[i])
        mark[i] &= among[i]
    excess = sum(map(np.count_nonzero, mark)) - k
    for tensor, equal in zip(reversed(marks), reversed(scores), strict=True):
        if not excess:
            break
        row_major = tensor.contiguous()
        excess = _unmark_last(_flat(row_major), _flat(equal.contiguous()), kth, excess)
        tensor.copy_(row_major)
    return marks


def _kth_best(score, among, k, size, highest):
    """Return the k-th highest (or lowest) score of `size` candidates.

    Gathering all candidates would be the slowest part. A sample gives two bounds that most likely enclose the k-th
    score: the candidates better than both are counted, and only those between are gathered. If the k-th score is not
    between them, all candidates are gathered: the result is exact, only later.
    """
    beyond, values = 0, None
    step = size // SAMPLE
    if step > 1:
        sample = np.sort(np.concatenate([s[::step][a[::step]] for s, a in zip(score, among, strict=True)]))
        best_first = sample[::-1] if highest else sample
        rank = k / size * sample.size
        slack = 4 * (rank * (1 - k / size)) ** 0.5 + 8
        near, far = int(rank - slack), int(rank + slack)
        if near >= 0 and far < sample.size:
            beyond, values = _gather_between(score, among, best_first[near], best_first[far], highest)
    if values is None or not beyond < k <= beyond + values.size:
        beyond, values = 0, np.concatenate([s[a] for s, a in zip(score, among, strict=True)])
    position = values.size - (k - beyond) if highest else k - beyond - 1
    values.partition(position)
    return values[position]


def _gather_between(score, among, near, far, highest):
    """Return the number of candidates better than `near`, and the scores of the candidates from `near` to `far`."""
    better, meets = (np.greater, np.greater_equal) if highest else (np.less, np.less_equal)
    beyond, between = 0, []
    for whole, flags in zip(score, among, strict=True):
        for start in range(0, whole.size, CHUNK):
            part, candidate = whole[start : start + CHUNK], flags[start : start + CHUNK]
            past = better(part, near) & candidate
            beyond += np.count_nonzero(past)
            between.append(part[meets(part, far) & candidate & ~past])
    return beyond, np.concatenate(between)


def _unmark_last(mark, score, value, count):
    """Unmark the last `count` marked entries whose score is `value`; return the number of entries not found."""
    for end in range(mark.size, 0, -CHUNK):
        part = slice(max(end - CHUNK, 0), end)
        tied = np.flatnonzero(mark[part] & (score[part] == value))[-count:]
        mark[part][tied] = False
        count -= tied.size
        if not count:
            break
    return count


def _without_nan(score):
    if not score.sum().isnan():
        return score
    return score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _laid_out_as(like, tensor):
    same = tensor.stride() == like.stride()
    return tensor if same else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _flat(tensor):
    """Return the entries in memory order as a numpy view; `tensor` must have no gaps."""
    return tensor.as_strided((tensor.numel(),), (1,)).numpy()


def _mark_lowest_on_device(scores, candidates, k, negate):
    """Do the same as `_mark_lowest_on_cpu` without waiting for the device: the host reads no value and no count."""
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


def count_of(rate: float, number: int) -> int:
    """Return the fraction `rate` of a number, rounded up.

    >>> count_of(0.07, 100), 0.07 * 100
    (7, 7.000000000000001)
    """
    return math.ceil(rate * number * (1 - 1e-12))


def apportion(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """Divide `total` units among parts in proportion to `shares`, at most `capacity[i]` to part i.

    This is the largest remainder method; of equal remainders the earlier part comes first. What a full part cannot take
    goes to the others in proportion to their shares. If their shares are all zero, they count as equal.

    >>> apportion(10, shares=[1, 1, 2], capacity=[9, 9, 3])
    [4, 3, 3]

    Raises:
        ValueError: if a share is negative or not finite, or if the parts cannot hold `total`.
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
            # Slightly less, so that rounding errors never make the sum of the floors exceed `left`.
            floor = np.floor(quota * (1 - 1e-12)).astype(np.int64)
            # Remainders that differ only by rounding errors count as equal.
            by_remainder = np.argsort(np.round(floor - quota, 9), kind="stable")
            by_remainder = by_remainder[open_[by_remainder]]
            counts += floor
            counts[by_remainder[: left - floor.sum()]] += 1
            break
        counts[full] = room[full]
        left -= int(room[full].sum())
        open_ &= ~full
    return counts.tolist()
