"""Selection over weights that are sharded among processes.

The processes agree on a threshold by adding up histograms: no weight and no score is gathered, and the result is
exactly that of one process, ties included.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselearning.processes.sharded import indices_of, is_sharded, joined, shard_of

DIGIT_BITS = 16  # a float32 takes two histograms of 65,536 counts, 512 KiB each


@torch.no_grad()
def mark_lowest(scores: Sequence[Tensor], candidates: Sequence[Tensor], k: int, *, negate: bool) -> list[Tensor]:
    """Mark the k candidates with the lowest scores (highest, if `negate`); of equals, earlier entries first.

    This is `selection._mark_lowest` for candidates of which at least one is sharded; a score may be whole.
    """
    mesh = _mesh_of_all(candidates)

    def total(counts: Tensor) -> Tensor:
        for dim in range(mesh.ndim):
            dist.all_reduce(counts, group=mesh.get_group(dim))
        return counts

    keys = [_key(_part_like(score, among), negate) for score, among in zip(scores, candidates, strict=True)]
    here = [_part_like(among, among) for among in candidates]
    counted = [_counts_here(among, mesh) for among in candidates]
    joint = torch.cat([key[mine & counts] for key, mine, counts in zip(keys, here, counted, strict=True)])
    bits = 64 if any(score.dtype == torch.float64 for score in scores) else 32
    kth, below, tied = _kth_lowest(joint, k, bits, total)
    if kth is None:
        return [among.clone() for among in candidates]
    if below + tied == k:
        marks = [mine & (key <= kth) for key, mine in zip(keys, here, strict=True)]
        return [joined(mark, among) for mark, among in zip(marks, candidates, strict=True)]

    # Of the candidates with the score of the last one marked, the first in row-major order are marked.
    marks = [mine & (key < kth) for key, mine in zip(keys, here, strict=True)]
    ties = [mine & (key == kth) for key, mine in zip(keys, here, strict=True)]
    starts = [sum(among.numel() for among in candidates[:i]) for i in range(len(candidates))]
    places = [start + _positions(among, tie) for start, among, tie in zip(starts, candidates, ties, strict=True)]
    joint = torch.cat([place[counts.expand_as(place)] for place, counts in zip(places, counted, strict=True)])
    size = sum(among.numel() for among in candidates)
    last, *_ = _kth_lowest(joint, k - below, size.bit_length() + 1, total)
    for mark, tie, place in zip(marks, ties, places, strict=True):
        mark[tie] = place <= last  # pyright: ignore[reportOperatorIssue]: there are more ties than are marked
    return [joined(mark, among) for mark, among in zip(marks, candidates, strict=True)]


def _kth_lowest(keys: Tensor, k: int, bits: int, total: Callable[[Tensor], Tensor]) -> tuple[int | None, int, int]:
    """Return the k-th lowest key over all processes, the number of lower keys, and the number of equal ones.

    The key is None if there are at most k keys. `keys` are int64 and fit into `bits` bits, sign included. A radix
    selection: from the highest `DIGIT_BITS` bits to the lowest, a histogram of these bits decides which keys remain.
    """
    lowest = -(1 << (bits - 1))
    places = range(math.ceil(bits / DIGIT_BITS))
    keys = keys - lowest if bits < 64 else keys ^ lowest  # from 0 on, as an unsigned number
    kth, below, equal = 0, 0, 0
    for place in reversed(places):
        digits = (keys >> (place * DIGIT_BITS)) & ((1 << min(DIGIT_BITS, bits - place * DIGIT_BITS)) - 1)
        counts = total(torch.bincount(digits, minlength=1 << DIGIT_BITS))
        ends = counts.cumsum(0)
        digit = torch.searchsorted(ends, k - below)
        at = digit.clamp(max=len(counts) - 1)
        found, end, equal, size = torch.stack([digit, ends[at], counts[at], ends[-1]]).tolist()
        if place == places[-1] and size <= k:
            return None, 0, 0
        below += end - equal
        keys = keys[digits == found]
        kth = kth << DIGIT_BITS | found
    return kth + lowest, below, equal


def _key(score: Tensor, negate: bool) -> Tensor:
    """Return int64 keys with the order of the scores: equal scores get equal keys, NaN ranks below every number."""
    score = score if score.dtype in (torch.float32, torch.float64) else score.float()
    score = (-score if negate else score) + 0.0  # no -0.0, which equals 0.0
    nan = torch.inf if negate else -torch.inf
    score = score.nan_to_num(nan=nan, posinf=torch.inf, neginf=-torch.inf).contiguous()
    bits, highest = (torch.int64, (1 << 63) - 1) if score.dtype == torch.float64 else (torch.int32, (1 << 31) - 1)
    pattern = score.view(bits)
    return torch.where(pattern < 0, pattern ^ highest, pattern).to(torch.int64)


def _part_like(tensor: Any, like: Any) -> Tensor:
    """Return this process's part of a tensor, after sharding it like `like`."""
    if not is_sharded(like):
        return tensor.full_tensor() if is_sharded(tensor) else tensor
    if not is_sharded(tensor):
        tensor = shard_of(tensor, like)
    return tensor.redistribute(placements=like.placements).to_local()


def _mesh_of_all(tensors: Sequence[Any]) -> Any:
    """Return the mesh that holds all of these tensors; smaller ones are slices of it, as of FSDP2 beside FSDP2 + TP.

    Raises:
        ValueError: if there is none.
    """
    meshes = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]
    largest = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(_ranks(largest))
    for mesh in meshes:
        if not ranks.issuperset(_ranks(mesh)):
            raise ValueError(
                f"Weights on the processes {_ranks(mesh)} and {_ranks(largest)} are compared with each other, and "
                "neither holds all. Use one DeviceMesh, or a Masking for each part of the network."
            )
    return largest


def _ranks(mesh):
    return mesh.mesh.flatten().tolist()


def _counts_here(tensor: Any, mesh: Any) -> Tensor:
    """Tell whether this process counts its part of a tensor: of the processes that hold the same part, one does."""
    first = _ranks(mesh)[0]
    if not is_sharded(tensor):
        return torch.tensor(dist.get_rank() == first, device=tensor.device)
    own = tensor.device_mesh
    copies = [at for at, place in zip(own.get_coordinate(), tensor.placements, strict=True) if place.is_replicate()]
    return torch.tensor(first in _ranks(own) and not any(copies), device=tensor.device)


def _positions(tensor: Any, among: Tensor) -> Tensor:
    """Return the positions in the whole tensor, in row-major order, of the marked entries of this process's part."""
    places = among.nonzero()
    position = torch.zeros(len(places), dtype=torch.int64, device=among.device)
    indices = indices_of(tensor) if is_sharded(tensor) else [torch.arange(size) for size in tensor.shape]
    for dim, (held, size) in enumerate(zip(indices, tensor.shape, strict=True)):
        position = position * size + held.to(among.device)[places[:, dim]]
    return position
