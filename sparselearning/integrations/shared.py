"""What the trainers' modules share: masks that begin or go on, and the figures that a log is given."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import IterableDataset

from sparselearning.core import Masking
from sparselearning.flops import Flops, forward_flops, relative_flops
from sparselearning.generators import random_state, set_random_state
from sparselearning.methods import Method
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.layers import Density


def start(
    method: str | Method,
    module: nn.Module,
    optimizer: Any,
    total_steps: int,
    density: Density,
    parts: Mapping[str, Any],
    saved: dict[str, Any] | None,
) -> Masking:
    """Return the masks of a method on `module`: new ones, or those of a `saved` state, which leave the weights alone.

    Trainers load weights and momenta before there are masks; masks drawn at random would set most of them to zero.
    """
    return Masking.from_method(method, module, optimizer, total_steps, density, state=saved, **parts)


def release(masking: Masking) -> dict[str, Any]:
    """Return the state of masks, and let their weights go, so that another Masking can go on with them."""
    state = masking.state_dict()
    masking.release()
    return state


def refuse_shards(module: nn.Module, strategy: str) -> None:
    """Check that every process holds whole weights; `strategy` names one that does not, or is empty.

    Raises:
        RuntimeError: if not: checkpoints would not hold the masks.
    """
    if strategy or any(map(is_sharded, module.parameters())):
        raise RuntimeError(
            f"Expected whole weights in every process: one process, or DDP. Got {strategy or 'FSDP'}, which divides "
            "them. Use DDP, or Masking in a loop of your own, which takes FSDP2."
        )


def masks_in(saved: Any, anew: str) -> dict[str, Any]:
    """Return the masks of a checkpoint to go on from; `anew` says how to train its weights from the first step.

    Raises:
        RuntimeError: if it has none.
    """
    if saved:
        return saved["masking"]
    raise RuntimeError(
        "Expected a checkpoint with masks, got one without: a dense run saved it, or only its weights were saved. "
        f'To start from its weights, load them into the model, and {anew}; sparse_init="resume" keeps their zeros.'
    )


def known_steps(steps: float) -> int:
    """Return the number of steps of a training, if it is one.

    Raises:
        ValueError: if it is infinite or below 1.
    """
    if not math.isfinite(steps) or steps < 1:
        raise ValueError(
            f"Expected a training of a known number of steps, got {steps} by the Trainer's estimate. Pass "
            "Trainer(max_steps=...), or SparseCallback(total_steps=...)."
        )
    return int(steps)


def first_example(loader: Any) -> Any:
    """Return a batch of the first example of a loader's data; None of data without indices (an IterableDataset)."""
    with same_random_numbers():
        return None if isinstance(loader.dataset, IterableDataset) else loader.collate_fn([loader.dataset[0]])


def count_flops(module: nn.Module, example: Any) -> Flops | None:
    """Count the FLOPs of a module on an input, a tuple of inputs, or inputs by name; nothing is counted of None."""
    if example is None:
        return None
    weight = next(module.parameters())
    named = dict(example) if isinstance(example, Mapping) else {}
    inputs = () if named else example if isinstance(example, tuple) else (example,)
    inputs, named = tree_map(lambda value: _like(weight, value), (inputs, named))
    with same_random_numbers():
        return forward_flops(module, *inputs, **named)


def _like(weight, value):
    """Return a tensor on the device of a weight, and of its dtype unless it holds indices."""
    if not isinstance(value, Tensor):
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def figures(masking: Masking, flops: Flops | None, steps_per_epoch: int) -> dict[str, float]:
    """Return what a log is given: density, and FLOPs relative to the dense network's if those are known."""
    return {"density": masking.density} | (relative_flops(flops, masking, steps_per_epoch) if flops else {})


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Draw random numbers without a change to those that come after."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
