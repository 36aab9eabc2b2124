# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
"""Sparse training in a loop with `accelerate.Accelerator`.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    masking = prepare(accelerator, model, optimizer, "rigl", density=0.1, total_steps=epochs * len(loader))

Whole examples: docs/accelerate.md.
"""

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

from sparselearning.core import Masking
from sparselearning.integrations.shared import figures, refuse_shards
from sparselearning.methods import Method
from sparselearning.start.layers import Density

__all__ = ["figures", "prepare"]

REPLICATED = {DistributedType.NO, *(kind for kind in DistributedType if kind.value.startswith("MULTI_"))}


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    method: str | Method = "sparse_momentum",
    density: Density = 0.05,
    *,
    total_steps: int,
    **parts: Any,
) -> Masking:
    """Return the masks of a method on a model that the accelerator prepared; `save_state` and `load_state` hold them.

    Call it before `load_state`, which then brings back weights and masks together.

    Args:
        accelerator: with whole weights in every process: one process, or DDP.
        model, optimizer: as `accelerator.prepare` returned them.
        method: a key of `methods.METHODS`, or a `Method`.
        density: fraction of the masked weights that is active at the end, in (0, 1].
        total_steps: steps of the optimizer: epochs * len(loader) / gradient accumulation steps.
        parts: parts of the method, and arguments of Masking and `add_module`; see `methods.arguments_of`.

    Raises:
        RuntimeError: if the accelerator divides the weights among processes (FSDP, DeepSpeed, Megatron).
        ValueError, TypeError: as `Masking.from_method`.
    """
    kind = accelerator.distributed_type
    refuse_shards(model, "" if kind in REPLICATED else kind.value)
    whole = accelerator.unwrap_model(model)
    masking = Masking.from_method(method, whole, optimizer, total_steps, density, **parts)
    accelerator.register_for_checkpointing(masking)
    return masking
