"""Processes that torchrun starts to train one model together, with the same masks."""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparselearning.processes.sharded import is_sharded

PATIENCE = timedelta(minutes=5)  # time to wait for a process that is alive but silent; a dead one is noticed at once


class ProcessError(RuntimeError):
    """The processes no longer train one model: their masks differ, or a process is gone."""


def start(device: torch.device | str) -> torch.device:
    """Join the process group if torchrun started this process; return the device of this process.

    'cuda' becomes the GPU with the local rank of this process, and GPUs communicate through NCCL; other devices through
    Gloo.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Gloo sends what lies on the host, which does not need to wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Turn every error of the connection to another process into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")
        if not in_process_group() or not any(word in str(error) for word in words):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessError(f"Process {rank()} lost another process, which has died or hangs: {reason}") from error


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if in_process_group() else 0


def processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if in_process_group() else 1


def in_process_group() -> bool:
    """Tell whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place, and return it. One process alone changes nothing."""
    if in_process_group():
        dist.all_reduce(values)
    return values


def send_to_all(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, in place, and return it. One process alone changes nothing."""
    if in_process_group():
        dist.broadcast(values, src=0)
    return values


def from_first(value: Any) -> Any:
    """Return the value that the first process passes; it may be any object."""
    if not in_process_group():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes by rank on the first process, an empty list on the others.

    A value may be any object.
    """
    if not in_process_group():
        return [value]
    values = [None] * processes() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def gather_everywhere(value: Any) -> list[Any]:
    """Return the values of all processes by rank, on each of them. A value may be any object."""
    if not in_process_group():
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def average_buffers(model: nn.Module) -> None:
    """Replace the model's floating-point buffers, the statistics of BatchNorm, by their mean over all processes."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not in_process_group() or not buffers:
        return
    mean = sum_over_processes(torch.cat([buffer.flatten() for buffer in buffers])) / processes()
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def replicate(model: nn.Module) -> nn.Module:
    """Return the model in DistributedDataParallel, which averages gradients; one process alone gets `model` itself.

    Each process keeps its own buffers; see `average_buffers`.
    """
    if not in_process_group():
        return model
    DDP = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDP(model, gradient_as_bucket_view=True, **buffers)


def without_sync(model: nn.Module) -> AbstractContextManager:
    """Return a context in which DistributedDataParallel adds up gradients without sending them."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def broadcast_masks(masks: Iterable[Tensor]) -> None:
    """Overwrite the masks of every process with those of rank 0, in place and in one message.

    Sharded masks are left out: each process already holds its own part. One process alone does nothing.
    """
    masks = [mask for mask in masks if not is_sharded(mask)]
    if not masks or not in_process_group():
        return
    flat = torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)
    dist.broadcast(flat, src=0)
    parts = flat.bool().split([mask.numel() for mask in masks])
    for mask, part in zip(masks, parts, strict=True):
        mask.copy_(part.view_as(mask))


def check_agreement(masks: Iterable[Tensor]) -> None:
    """Compare the checksums of the masks of all processes. One process alone does nothing.

    Raises:
        ProcessError: on every process, if the masks differ.
    """
    if not in_process_group():
        return
    masks = [mask for mask in masks if not is_sharded(mask)]
    device = masks[0].device if masks else torch.device("cpu")
    mine = torch.tensor(0, device=device)
    for i, mask in enumerate(masks):
        mine = mine + checksum(mask) * (2 * i + 1)
    all_of_them = [torch.zeros_like(mine) for _ in range(processes())]
    dist.all_gather(all_of_them, mine)
    values = torch.stack(all_of_them).tolist()
    if differing := [i for i, value in enumerate(values) if value != values[0]]:
        raise ProcessError(
            f"The masks of rank {', '.join(map(str, differing))} differ from those of rank 0. Expected the same "
            "on all processes: make the same calls of add_module, remove_weight and load_state_dict on each."
        )


def checksum(mask: Tensor) -> Tensor:
    """Return a number (int64, 0-d) that depends on the size of a mask and on the positions of its active entries."""
    mixed = torch.arange(mask.numel(), device=mask.device)
    for factor in (-7046029254386353131, -4658895280553007687):  # of splitmix64, so that neighbours differ strongly
        mixed = (mixed + 1) * factor
        mixed = mixed ^ (mixed >> 31)
    return mixed.masked_fill(~mask.flatten(), mask.numel()).sum()
