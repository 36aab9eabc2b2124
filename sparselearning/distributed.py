"""Masks agree across processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def in_process_group() -> bool:
    """Tell whether this process runs beside others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast_masks(masks: Sequence[Tensor]) -> None:
    """Overwrite the masks of every process with those of rank 0, in place and in one message."""
    flat = torch.cat([mask.flatten() for mask in masks]).to(torch.uint8)
    dist.broadcast(flat, src=0)
    parts = flat.bool().split([mask.numel() for mask in masks])
    for mask, part in zip(masks, parts, strict=True):
        mask.copy_(part.view_as(mask))
