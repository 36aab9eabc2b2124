"""How many bytes a training holds besides activations, from its checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparselearning import checkpoint


def bytes_held(path: str | Path) -> int:
    """Return the bytes of weights, gradients, optimizer state and masks of a run, from its checkpoint.

    A gradient is as large as the values of its weight. Of weights that are held as active values, the places count
    once, with the weights. A mask has a byte for each weight.

    Raises:
        FileNotFoundError, CheckpointError: as `checkpoint.read`.
    """
    saved = checkpoint.read(path)
    weights = list({tensor.data_ptr(): tensor for tensor in tensors_in(saved["model"])}.values())  # tied ones once
    states = [*tensors_in(saved["optimizer"]["state"])]
    values = sum(tensor.nbytes for tensor in (*weights, *weights, *states) if tensor.is_floating_point())
    places = sum(tensor.nbytes for tensor in weights if not tensor.is_floating_point())
    masks = [layer["mask"] for layer in saved.get("mask", {}).get("layers", {}).values()]
    held_as_places = places > 0
    return values + places + (0 if held_as_places else sum(mask.nbytes for mask in masks if isinstance(mask, Tensor)))


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)
