"""What the trainers' modules share: masks that begin or go on, and the figures that a log is given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from sparselearning.core import Masking
from sparselearning.flops import Flops, forward_flops, relative_flops
from sparselearning.generators import random_state, set_random_state
from sparselearning.methods import Method
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.layers import Density

AT_START = {"sparse_init": "constant", "rescale": False}  # what masks that go on do not need scores for


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

    Trainers load weights before there are masks; masks drawn at random would set most of the loaded weights to zero.
    """
    if saved is None:
        return Masking.from_method(method, module, optimizer, total_steps, density, **parts)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    parts = {name: part for name, part in parts.items() if name != "batches"} | AT_START
    masking = Masking.from_method(method, module, optimizer, total_steps, density, **parts)
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    masking.load_state_dict(saved)
    return masking


def release(masking: Masking) -> dict[str, Any]:
    """Return the state of masks, and let their weights go, so that another Masking can go on with them."""
    state = masking.state_dict()
    masking.remove_weight_partial_name("")
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


def check_saved(saved: Any, anew: str) -> None:
    """Check that a checkpoint to go on from holds masks; `anew` says how to train its weights from the first step.

    Raises:
        RuntimeError: if not.
    """
    if not saved:
        raise RuntimeError(
            "Expected a checkpoint with masks, got one without: a dense run saved it, or only its weights were saved. "
            f'To start from its weights, load them into the model, and {anew}; sparse_init="resume" keeps their zeros.'
        )


def count_flops(model: nn.Module, loader: Any, example: Mapping[str, Any] | None) -> Flops | None:
    """Count the FLOPs of a model on inputs by name; None takes the first example of the loader's data.

    Of data without indices (an IterableDataset) nothing is counted.
    """
    if example is None and isinstance(loader.dataset, IterableDataset):
        return None
    weight = next(model.parameters())
    with same_random_numbers():
        given = example or loader.collate_fn([loader.dataset[0]])
        return forward_flops(model, **{name: _like(weight, value) for name, value in given.items()})


def _like(weight, value):
    if not isinstance(value, Tensor):
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def figures(masking: Masking, flops: Flops | None, steps_per_epoch: int) -> dict[str, float]:
    """Return what a log is given: density, and FLOPs relative to the dense network's if those are known."""
    return {"density": masking.density} | (relative_flops(flops, masking, steps_per_epoch) if flops else {})


class same_random_numbers:
    """A context after which the random numbers are those that they would be without it."""

    def __enter__(self):
        self.state = random_state()

    def __exit__(self, *_):
        set_random_state(self.state)
