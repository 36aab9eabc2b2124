"""Weights that are sharded among processes: DTensors, such as those of FSDP2's `fully_shard` and tensor parallelism.

A mask is sharded like its weight.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparselearning.processes.group import current


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
    for part in _fully_sharded(modules):
        part.reshard()


def shapes_gathered(modules: Iterable[nn.Module]) -> set[torch.Size]:
    """Return the shapes of all parameters that FSDP2 shows now; it may have gathered those that it shards."""
    return {parameter.shape for part in _fully_sharded(modules) for parameter in part.parameters()}


def _fully_sharded(modules) -> list[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())  # slow to import
    return [part for module in modules for part in module.modules() if isinstance(part, kind)]


def refuse_hidden_weights(module: nn.Module) -> None:
    """Check that the parameters of a module are its weights, whole or as DTensors.

    Raises:
        ValueError: for what hides them: FSDP1, DeepSpeed's ZeRO-3, DistributedDataParallel over tensor parallelism.
    """
    first = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(part, first) for part in module.modules()):
        found = "FullyShardedDataParallel (FSDP1), which hides weights in flat parameters"
    elif any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        found = "parameters of DeepSpeed's ZeRO-3, which are empty between the steps"
    elif any(hasattr(parameter, "_st_info") for parameter in module.parameters()):
        found = "DistributedDataParallel over tensor parallelism, which shows a part of each weight as a whole"
    elif any(hasattr(parameter, "_in_backward_optimizers") for parameter in module.parameters()):
        raise ValueError("An optimizer steps these weights inside the backward pass, where masks cannot follow.")
    else:
        return
    raise ValueError(
        f"Expected weights that are whole or DTensors, got {found}. Use fully_shard of torch.distributed.fsdp (FSDP2), "
        "also over tensor parallelism and with replicas (a mesh of two dimensions); or DistributedDataParallel."
    )


def shard_of(whole: Tensor, like: Any) -> Any:
    """Return `whole`, which every process holds, sharded like the DTensor `like` of the same shape. Nothing is sent."""
    part = whole
    for dim, held in enumerate(indices_of(like)):
        if len(held) < like.shape[dim]:
            part = part.index_select(dim, held.to(part.device))
    return joined(part.to(like.device, copy=True).contiguous(), like)


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
    return added_up(local_part(mask).sum(), mask) if is_sharded(mask) else mask.count_nonzero()


def add_up(values: list) -> list:
    """Return numbers and 0-d tensors; the DTensors among them are added up over processes, in a message per mesh."""
    kinds = {(value.device_mesh, value.placements) for value in values if is_sharded(value)}
    if any(not (place.is_partial() or place.is_replicate()) for _, places in kinds for place in places):
        return [value.full_tensor() if is_sharded(value) else value for value in values]
    found = list(values)
    for mesh, placements in sorted(kinds, key=lambda kind: (kind[0].size(), str(kind[1]))):
        where = [
            i for i, x in enumerate(values) if is_sharded(x) and (x.device_mesh, x.placements) == (mesh, placements)
        ]
        sums = torch.stack([values[i].to_local().to(torch.float64) for i in where])  # exact for counts below 2^53
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                dist.all_reduce(sums, group=mesh.get_group(dim))
        for i, total in zip(where, sums, strict=True):
            found[i] = total
    return found


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


def highest(value: float, weights: Iterable[Any]) -> float:
    """Return the highest value of all processes if one of the weights is sharded, or `value` if all are whole."""
    weights = list(weights)
    if not any(map(is_sharded, weights)):
        return value
    values = torch.tensor(value, dtype=torch.float64, device=weights[0].device)
    current().reduce(values, "MAX")
    return values.item()


def uniform_like(mask: Tensor) -> Tensor:
    """Return random numbers in [0, 1), float32, of the shape of the mask.

    For a sharded mask they are the numbers that the first process would draw for the whole mask; the generators of the
    other processes do not advance.
    """
    if not is_sharded(mask):
        return torch.rand(mask.shape, device=mask.device)
    on_gpu = mask.device.type == "cuda"
    state = torch.cuda.get_rng_state(mask.device) if on_gpu else torch.get_rng_state()
    sent = state.to(mask.device)
    current().broadcast(sent)
    generator = torch.Generator(mask.device)
    generator.set_state(sent.cpu())
    whole = torch.rand(mask.shape, device=mask.device, generator=generator)
    if current().rank == 0:
        state = generator.get_state()
        torch.cuda.set_rng_state(state, mask.device) if on_gpu else torch.set_rng_state(state)
    return shard_of(whole, mask)


def joined(part: Tensor, like: Any) -> Any:
    """Return the DTensor, sharded like `like`, of which this process holds `part`; `part` itself if `like` is whole."""
    from torch.distributed.tensor import DTensor

    if not is_sharded(like):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def added_up(part: Tensor, like: Any) -> Any:
    """Return a 0-d tensor of which each part of the DTensor `like` has a summand; `part` itself if `like` is whole.

    `add_up` and `fetch` add the summands up. Compute with numbers before: torch 2.6 and 2.7 divide such a tensor by the
    number that they divided the first one by.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not is_sharded(like):
        return part
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False)


def indices_of(tensor: Any) -> list[Tensor]:
    """Return for each dimension of a DTensor which of its indices this process holds.

    `Shard` divides into consecutive parts. `_StridedShard`, of FSDP2 over tensor parallelism on one dimension, divides
    each of the parts that another dimension of the mesh will hold.

    Raises:
        ValueError: for any other placement, such as a sum that is not added up yet.
    """
    indices = [torch.arange(size) for size in tensor.shape]
    mesh = tensor.device_mesh
    for at, parts, placement in zip(mesh.get_coordinate(), mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            continue
        if type(placement).__name__ not in ("Shard", "_StridedShard"):
            raise ValueError(
                f"Masks need weights that are sharded or replicated, got {placement}. Call redistribute on the weight "
                "before add_module."
            )
        pieces = indices[placement.dim].chunk(getattr(placement, "split_factor", 1))
        chunks = [piece.chunk(parts) for piece in pieces]
        indices[placement.dim] = torch.cat([chunk[at] if at < len(chunk) else chunk[0][:0] for chunk in chunks])
    return indices


def extent_of(tensor: Any) -> list[tuple[int, int, int]]:
    """Return (first index, last index, number) of this process's part, for each dimension."""
    if not is_sharded(tensor):
        return [(0, size - 1, size) for size in tensor.shape]
    indices = indices_of(tensor)
    return [(int(held[0]), int(held[-1]), len(held)) if len(held) else (0, -1, 0) for held in indices]
