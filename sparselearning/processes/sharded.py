"""Selection over weights that are sharded among processes (DTensors, such as those of FSDP2's `fully_shard`).

A mask is sharded like its weight. The processes agree on a threshold by adding up histograms: no weight and no score is
gathered, and the result is exactly that of one process, ties included.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

DIGIT_BITS = 16  # a float32 takes two histograms of 65,536 counts, 512 KiB each


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor, of which this process holds a part."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # slow to import; before that no tensor is a DTensor
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds: its shard of a DTensor, all of any other tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole weights that FSDP2 gathered for a forward pass, so that modules hold their shards again.

    FSDP2 keeps the whole weights of the outermost module until a backward pass, hence also after an evaluation. Until
    then the module shows other parameters than the optimizer's, and the next forward pass would miss writes to the
    shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not hasattr(fsdp, "FSDPModule"):
        return
    for module in modules:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                fsdp.FSDPModule.reshard(part)


def shard_of(whole: Tensor, like: Any) -> Any:
    """Return `whole`, which every process holds, sharded like the DTensor `like` of the same shape. Nothing is sent."""
    part = whole
    for dim, (start, size) in enumerate(_extent(like)):
        part = part.narrow(dim, start, size)
    return _joined(part.to(like.device, copy=True).contiguous(), like)


def placed_like(mask: Tensor, value: Tensor) -> Tensor:
    """Return a copy of a tensor that lies where the mask lies: on its device, and sharded like it."""
    if is_sharded(mask) and not is_sharded(value) and value.shape == mask.shape:
        return shard_of(value, mask)
    return value.to(mask.device, copy=True)


def unsharded(state: Any) -> Any:
    """Return a state_dict, or any nested dicts and lists, with every DTensor gathered. All processes must call it."""
    if is_sharded(state):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: unsharded(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(unsharded(value) for value in state)
    return state


class Whole:
    """Wraps a part of a checkpoint (model, optimizer, Masking): saves it whole, and shards it when it is loaded."""

    def __init__(self, part: Any):
        self.part = part
        self.kind = type(part).__name__.removeprefix("FSDP")  # the name in a checkpoint of one process

    def state_dict(self) -> dict[str, Any]:
        """Return the state with every DTensor gathered. All processes must call it."""
        return unsharded(self.part.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a whole state; tensors of a sharded weight are sharded like it."""
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
    """Return the number of active entries as a 0-d tensor; `add_up` or `fetch` adds up that of a sharded mask."""
    return mask.sum() if is_sharded(mask) else mask.count_nonzero()  # DTensor has no count_nonzero


def add_up(values: list) -> list:
    """Return numbers and 0-d tensors; the DTensors among them are added up over processes, in one message."""
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
    """Return the highest value of all processes that share a sharded weight, or `value` if the weight is whole."""
    if not is_sharded(weight):
        return value
    values = torch.tensor(value, dtype=torch.float64, device=weight.device)
    for dim in range(weight.device_mesh.ndim):
        dist.all_reduce(values, dist.ReduceOp.MAX, group=weight.device_mesh.get_group(dim))
    return values.item()


def uniform_like(mask: Tensor) -> Tensor:
    """Return random numbers in [0, 1), float32, of the shape of the mask.

    For a sharded mask they are the numbers that process 0 would draw for the whole mask; the generators of the other
    processes do not advance.
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
    """Mark the k candidates with the lowest scores (highest, if `negate`); of equals, earlier entries first.

    This is `selection._mark_lowest` for candidates of which at least one is sharded; a score may be whole.
    """
    mesh = next(among.device_mesh for among in candidates if is_sharded(among))  # pyright: ignore[reportAttributeAccessIssue]

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
        return [_joined(mark, among) for mark, among in zip(marks, candidates, strict=True)]

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
    return [_joined(mark, among) for mark, among in zip(marks, candidates, strict=True)]


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


def _joined(part: Tensor, like: Any) -> Any:
    """Return the DTensor, sharded like `like`, of which this process holds `part`; `part` itself if `like` is whole."""
    from torch.distributed.tensor import DTensor

    if not is_sharded(like):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _counts_here(tensor: Any, mesh: Any) -> Tensor:
    """Tell whether this process counts its part of a tensor: of the processes that hold the same part, one does."""
    coordinate = mesh.get_coordinate()
    placements = tensor.placements if is_sharded(tensor) else [None] * mesh.ndim
    first = all(at == 0 or (p is not None and p.is_shard()) for at, p in zip(coordinate, placements, strict=True))
    return torch.tensor(first, device=tensor.device)


def _positions(tensor: Any, among: Tensor) -> Tensor:
    """Return the positions in the whole tensor, in row-major order, of the marked entries of this process's part."""
    places = among.nonzero()
    sizes = tensor.shape
    starts = [start for start, _ in _extent(tensor)] if is_sharded(tensor) else [0] * len(sizes)
    position = torch.zeros(len(places), dtype=torch.int64, device=among.device)
    for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        position = position * size + places[:, dim] + start
    return position


def _extent(tensor: Any) -> list[tuple[int, int]]:
    """Return (start, size) of this process's part of a DTensor, for each dimension.

    Raises:
        NotImplementedError: if the DTensor is not sharded into consecutive parts.
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
