"""Processes that train one model together, started by torchrun: their masks agree."""

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

PATIENCE = timedelta(minutes=5)  # of a process for another that is alive and silent; one that ends is noticed at once


class ProcessError(RuntimeError):
    """The processes no longer train one model: masks differ, or one of them is gone."""


def start(device: torch.device | str) -> torch.device:
    """Join the processes of torchrun, if it started this one; return the device of this process.

    'cuda' becomes the GPU of the process's number on its machine, with NCCL; other devices talk through Gloo.
    """
    device = torch.device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Numbers of the host travel by Gloo: they have nothing to wait for on the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Turn the errors of a connection to another process, whatever their type, into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "ProcessGroup")
        if not in_process_group() or not any(word in str(error) for word in words):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessError(f"Process {rank()} lost another one, which has died or hangs: {reason}") from error


def stop() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return dist.get_rank() if in_process_group() else 0


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if in_process_group() else 1


def in_process_group() -> bool:
    """Tell whether this process runs beside others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes; itself where there is one."""
    if in_process_group():
        dist.all_reduce(values)
    return values


def send_to_all(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, in place, and return it; nothing happens where there is one process."""
    if in_process_group():
        dist.broadcast(values, src=0)
    return values


def from_first(value: Any) -> Any:
    """Return what the first process gives; it may be any object."""
    if not in_process_group():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Return on the first process what each gives, by rank; on the others an empty list. It may be any object."""
    if not in_process_group():
        return [value]
    values = [None] * processes() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def average_buffers(model: nn.Module) -> None:
    """Replace the model's floating-point buffers, the statistics of BatchNorm, by their mean over all processes."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not in_process_group() or not buffers:
        return
    mean = sum_over_processes(torch.cat([buffer.flatten() for buffer in buffers])) / processes()
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def replicate(model: nn.Module) -> nn.Module:
    """Return the model such that its gradients are averaged over all processes; itself where there is one.

    Buffers are left alone; see `average_buffers`.
    """
    if not in_process_group():
        return model
    DDP = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(DDP).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDP(model, gradient_as_bucket_view=True, **buffers)


def without_sync(model: nn.Module) -> AbstractContextManager:
    """Return the context in which DistributedDataParallel adds up gradients, without sending them."""
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
            f"The masks of rank {', '.join(map(str, differing))} differ from those of rank 0. Expected the same on all "
            "processes: call add_module, remove_weight and load_state_dict alike on each."
        )


def checksum(mask: Tensor) -> Tensor:
    """Return a number (int64, 0-d) that depends on the shape of a mask and on where it is active."""
    mixed = torch.arange(mask.numel(), device=mask.device)
    for factor in (-7046029254386353131, -4658895280553007687):  # of splitmix64, to make neighbours unlike
        mixed = (mixed + 1) * factor
        mixed = mixed ^ (mixed >> 31)
    return mixed.masked_fill(~mask.flatten(), mask.numel()).sum()
