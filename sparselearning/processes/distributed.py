"""Processes that torchrun starts to train one model together, with the same masks."""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparselearning.processes.agreement import check_agreement, checksum
from sparselearning.processes.group import PATIENCE, ProcessError, current
from sparselearning.processes.sharded import is_sharded

__all__ = ["PATIENCE", "ProcessError", "check_agreement", "checksum"]


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
        if processes() == 1 or not any(word in str(error) for word in words):
            raise
        reason = str(error).splitlines()[0]
        raise ProcessError(f"Process {rank()} lost another process, which has died or hangs: {reason}") from error


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process among all; 0 without a process group."""
    return dist.get_rank() if processes() > 1 else 0


def processes() -> int:
    """Return the number of all processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def in_process_group() -> bool:
    """Tell whether this process trains a network together with others."""
    return current().size > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Replace a tensor by its sum over all processes, in place, and return it. One process alone changes nothing."""
    current().reduce(values)
    return values


def send_to_all(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of the first process, in place, and return it. One process alone changes nothing."""
    current().broadcast(values)
    return values


def from_first(value: Any) -> Any:
    """Return the value that the first of all processes passes; it may be any object."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """Return the values of all processes by rank on the first process, an empty list on the others.

    A value may be any object.
    """
    if processes() == 1:
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
    """Overwrite the masks of every process with those of the first, in place and in one message.

    Sharded masks are left out: each process already holds its own part. One process alone does nothing.
    """
    masks = [mask for mask in masks if not is_sharded(mask)]
    if not masks or not in_process_group():
        return
    flat = torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)
    current().broadcast(flat)
    parts = flat.bool().split([mask.numel() for mask in masks])
    for mask, part in zip(masks, parts, strict=True):
        mask.copy_(part.view_as(mask))
