"""Selection over weights that are sharded among processes (DTensors, as of FSDP2's `fully_shard`).

A mask is sharded like its weight. The processes agree on a threshold by adding up histograms; no weight and no
score is gathered, and the result is that of one process, to the unit and to the tie.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

DIGIT_BITS = 16  # two histograms of 65,536 counts, 512 KiB, decide on a float32


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, of which this process holds a part."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # slow to import; where it is not, no tensor is one
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let modules hold their shards again, where FSDP2 keeps what it gathered for a forward pass.

    It does so for the outermost module until a backward pass, so after an evaluation. What is written into the shards
    then would not reach the next forward pass, and the module shows other parameters than the optimizer's.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in modules:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                fsdp.FSDPModule.reshard(part)


def shard_of(whole: Tensor, like: Any) -> Any:
    """Return `whole`, which every process holds, sharded like the DTensor `like` of its shape. Nothing is sent."""
    from torch.distributed.tensor import DTensor

    part = whole
    for dim, (start, size) in enumerate(_extent(like)):
        part = part.narrow(dim, start, size)
    part = part.to(like.device, copy=True).contiguous()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def placed_like(mask: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a saved tensor that lies where the mask lies: on its device, and sharded like it."""
    if is_sharded(mask) and value.shape == mask.shape:
        return shard_of(value, mask)
    return value.to(mask.device, copy=True)


def unsharded(state: Any) -> Any:
    """Return a state_dict, or any nest of dicts and lists, with every DTensor gathered; all processes call it."""
    if is_sharded(state):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: unsharded(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(unsharded(value) for value in state)
    return state


class Whole:
    """A part of a checkpoint (model, optimizer, Masking) that is saved unsharded, and sharded when it is loaded."""

    def __init__(self, part: Any):
        self.part = part
        self.kind = type(part).__name__.removeprefix("FSDP")  # what a checkpoint of one process calls it

    def state_dict(self) -> dict[str, Any]:
        """Return the state with every DTensor gathered; all processes call it."""
        return unsharded(self.part.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the whole; what belongs to a sharded weight is sharded like it."""
        if isinstance(self.part, nn.Module):
            here = self.part.state_dict()
            state = {name: shard_of(value, here[name]) if is_sharded(here.get(name)) else value
                     for name, value in state.items()}  # fmt: skip
        self.part.load_state_dict(state)
        if isinstance(self.part, torch.optim.Optimizer):
            for weight, entries in self.part.state.items():
                for key, value in entries.items():
                    if is_sharded(weight) and isinstance(value, Tensor) and value.shape == weight.shape:
                        entries[key] = value if is_sharded(value) else shard_of(value, weight)


def count_active(mask: Tensor) -> Tensor:
    """Return the number of active entries, a 0-d tensor; of a sharded mask still to be added up over processes."""
    return mask.sum() if is_sharded(mask) else mask.count_nonzero()  # DTensor has no count_nonzero


def add_up(values: list) -> list:
    """Return numbers and 0-d tensors with the DTensors among them added up over processes, in one message."""
    parts = [value for value in values if is_sharded(value)]
    if not parts or any(part.placements != parts[0].placements for part in parts):
        return [value.full_tensor() if is_sharded(value) else value for value in values]
    from torch.distributed.tensor import DTensor

    here = torch.stack([part.to_local().to(torch.float64) for part in parts])  # float64: exact for counts below 2^53
    sums = iter(DTensor.from_local(here, parts[0].device_mesh, parts[0].placements, run_check=False).full_tensor())
    return [next(sums) if is_sharded(value) else value for value in values]


def fetch(values: list) -> list[float]:
    """Return numbers and 0-d tensors as Python numbers, in one synchronisation.

    Those of sharded weights are added up over processes. Tensors of different dtypes are promoted as torch.stack does.
    """
    values = add_up(values)
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    device = tensors[0].device
    fetched = iter(torch.stack([tensor.reshape(()).to(device) for tensor in tensors]).tolist())
    return [next(fetched) if isinstance(value, Tensor) else float(value) for value in values]


def highest(value: float, weight: Any) -> float:
    """Return the highest value of all processes that share a sharded weight; the value itself for a whole one."""
    if not is_sharded(weight):
        return value
    values = torch.tensor(value, dtype=torch.float64, device=weight.device)
    for dim in range(weight.device_mesh.ndim):
        dist.all_reduce(values, dist.ReduceOp.MAX, group=weight.device_mesh.get_group(dim))
    return values.item()


def uniform_like(mask: Tensor) -> Tensor:
    """Return random numbers in [0, 1) of the mask's shape, float32.

    For a sharded mask those that process 0 would draw for the whole one; the generators of the others stay.
    """
    if not is_sharded(mask):
        return torch.rand(mask.shape, device=mask.device)
    on_gpu = mask.device.type == "cuda"
    state = torch.cuda.get_rng_state(mask.device) if on_gpu else torch.get_rng_state()
    sent = state.to(mask.device)
    dist.broadcast(sent, src=0)
    generator = torch.Generator(mask.device)
    generator.set_state(sent.cpu())
    whole = torch.rand(mask.shape, device=mask.device, generator=generator)
    if dist.get_rank() == 0:
        state = generator.get_state()
        torch.cuda.set_rng_state(state, mask.device) if on_gpu else torch.set_rng_state(state)
    return shard_of(whole, mask)


@torch.no_grad()
def mark_lowest(scores: Sequence[Tensor], candidates: Sequence[Tensor], k: int, *, negate: bool) -> list[Tensor]:
    """Mark the k candidates of lowest score (highest, if `negate`), earlier entries first among equals.

    As `selection._mark_lowest`, where at least one of the candidates is sharded; a score may be whole.
    """
    mesh = next(among.device_mesh for among in candidates if is_sharded(among))  # pyright: ignore[reportAttributeAccessIssue]

    def total(counts: Tensor) -> Tensor:
        for dim in range(mesh.ndim):
            dist.all_reduce(counts, group=mesh.get_group(dim))
        return counts

    keys = [_key(_local(score, among), negate) for score, among in zip(scores, candidates, strict=True)]
    here = [_local(among, among) for among in candidates]
    counted = [_counts_here(among, mesh) for among in candidates]
    joint = torch.cat([key[mine & counts] for key, mine, counts in zip(keys, here, counted, strict=True)])
    bits = 64 if any(score.dtype == torch.float64 for score in scores) else 32
    kth, below, tied = _kth_lowest(joint, k, bits, total)
    if kth is None:
        return [among.clone() for among in candidates]
    if below + tied == k:
        marks = [mine & (key <= kth) for key, mine in zip(keys, here, strict=True)]
        return [_as(mark, among) for mark, among in zip(marks, candidates, strict=True)]

    # Of the candidates that score the same as the last one taken, the first in row-major order are taken.
    marks = [mine & (key < kth) for key, mine in zip(keys, here, strict=True)]
    ties = [mine & (key == kth) for key, mine in zip(keys, here, strict=True)]
    starts = [sum(among.numel() for among in candidates[:i]) for i in range(len(candidates))]
    places = [start + _positions(among, tie) for start, among, tie in zip(starts, candidates, ties, strict=True)]
    joint = torch.cat([place[counts.expand_as(place)] for place, counts in zip(places, counted, strict=True)])
    size = sum(among.numel() for among in candidates)
    last, *_ = _kth_lowest(joint, k - below, size.bit_length() + 1, total)
    for mark, tie, place in zip(marks, ties, places, strict=True):
        mark[tie] = place <= last  # pyright: ignore[reportOperatorIssue]: there are more ties than are taken
    return [_as(mark, among) for mark, among in zip(marks, candidates, strict=True)]


def _kth_lowest(keys: Tensor, k: int, bits: int, total: Callable[[Tensor], Tensor]) -> tuple[int | None, int, int]:
    """Return the k-th lowest key over all processes, how many are lower, and how many are as low.

    None, if there are no more than k keys. `keys` is int64, of numbers that fit into `bits` bits with their sign.
    Decides on `DIGIT_BITS` bits at a time, from the highest on, by how many keys have each value there.
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
    """Return int64 keys in the order of the scores; equal scores have equal keys, NaN ranks below every number."""
    score = score if score.dtype in (torch.float32, torch.float64) else score.float()
    score = (-score if negate else score) + 0.0  # no -0.0, which equals 0.0
    nan = torch.inf if negate else -torch.inf
    score = score.nan_to_num(nan=nan, posinf=torch.inf, neginf=-torch.inf).contiguous()
    bits, highest = (torch.int64, (1 << 63) - 1) if score.dtype == torch.float64 else (torch.int32, (1 << 31) - 1)
    pattern = score.view(bits)
    return torch.where(pattern < 0, pattern ^ highest, pattern).to(torch.int64)


def _local(tensor: Any, like: Any) -> Tensor:
    """Return what this process holds of a tensor that is sharded like `like`, or to be."""
    if not is_sharded(like):
        return tensor.full_tensor() if is_sharded(tensor) else tensor
    if not is_sharded(tensor):
        tensor = shard_of(tensor, like)
    return tensor.redistribute(placements=like.placements).to_local()


def _as(part: Tensor, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if not is_sharded(like):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _counts_here(tensor: Any, mesh: Any) -> Tensor:
    """Tell whether this process is the one, of those that hold the same part of a tensor, that counts it."""
    coordinate = mesh.get_coordinate()
    placements = tensor.placements if is_sharded(tensor) else [None] * mesh.ndim
    first = all(at == 0 or (p is not None and p.is_shard()) for at, p in zip(coordinate, placements, strict=True))
    return torch.tensor(first, device=tensor.device)


def _positions(tensor: Any, among: Tensor) -> Tensor:
    """Return where in the whole tensor, in row-major order, the marked entries of this process's part are."""
    places = among.nonzero()
    sizes = tensor.shape
    starts = [start for start, _ in _extent(tensor)] if is_sharded(tensor) else [0] * len(sizes)
    position = torch.zeros(len(places), dtype=torch.int64, device=among.device)
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        position = position * size + places[:, dim] + start
    return position


def _extent(tensor: Any) -> list[tuple[int, int]]:
    """Return for each dimension where this process's part of a DTensor begins, and its size.

    Raises:
        NotImplementedError: if it is sharded in another way than in consecutive parts.
    """
    extent = [(0, size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    for at, parts, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard":
            raise NotImplementedError(
                f"Masks need weights sharded in consecutive parts (Shard or Replicate), got {placement}. "
                "Use fully_shard without tensor parallelism on the same dimension."
            )
        start, size = extent[placement.dim]
        part = -(-size // parts)
        begin = min(at * part, size)
        extent[placement.dim] = (start + begin, min(part, size - begin))
    return extent
