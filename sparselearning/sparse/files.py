"""Sparse weights in small files, and in ONNX."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.sparse.conversion import Affine, replace
from sparselearning.sparse.layout import forget_order
from sparselearning.sparse.modules import SparseLayer

ESCAPE = 255
VALUES, GAPS, SHAPE = ".sparse_values", ".sparse_gaps", ".sparse_shape"


def pack_positions(positions: np.ndarray) -> np.ndarray:
    """Return ascending positions as bytes: the zeros before each, and 255 for every 255 of them first.

    >>> pack_positions(np.array([0, 3, 600])).tolist()
    [0, 2, 255, 255, 86]
    """
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // ESCAPE
    packed = np.full(len(gaps) + int(escapes.sum()), ESCAPE, dtype=np.uint8)
    packed[np.arange(len(gaps)) + escapes.cumsum()] = gaps % ESCAPE
    return packed


def unpack_positions(packed: np.ndarray) -> np.ndarray:
    """Return the positions that `pack_positions` packed."""
    steps = packed.astype(np.int64) + (packed != ESCAPE)
    return steps.cumsum()[packed != ESCAPE] - 1


def save_compressed(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> tuple[int, int]:
    """Write a state_dict, weights with many zeros as values and packed positions, to a safetensors file.

    A position takes a byte at most densities, so a float32 weight at density 0.05 needs a sixteenth of its dense
    size. Return (bytes of the file, bytes of all tensors when dense).
    """
    tensors: dict[str, Tensor] = {}
    dense_bytes = 0
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu()
        dense_bytes += tensor.numel() * tensor.element_size()
        flat = tensor.flatten()
        positions = flat.nonzero().flatten()
        packed = pack_positions(positions.numpy())
        if len(packed) + len(positions) * tensor.element_size() >= tensor.numel() * tensor.element_size():
            tensors[name] = tensor.clone().contiguous()
            continue
        tensors[name + VALUES] = flat[positions]
        tensors[name + GAPS] = torch.from_numpy(packed)
        tensors[name + SHAPE] = torch.tensor(tensor.shape, dtype=torch.int64)
    safetensors().save_file(tensors, path)
    return Path(path).stat().st_size, dense_bytes


def load_compressed(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the dense state_dict of a file that `save_compressed` wrote.

    Raises:
        ValueError: if the file's positions and values do not belong together.
    """
    stored = safetensors().load_file(path)
    state = {}
    for name, tensor in stored.items():
        if name.endswith(VALUES):
            name = name.removesuffix(VALUES)
            state[name] = unpacked(name, tensor, stored)
        elif not name.endswith((GAPS, SHAPE)):
            state[name] = tensor
    return state


def unpacked(name: str, values: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """Return one dense tensor."""
    if name + GAPS not in stored or name + SHAPE not in stored:
        raise ValueError(f"The file holds values of {name!r} without their positions. Write it again.")
    dense = values.new_zeros(stored[name + SHAPE].tolist())
    positions = torch.from_numpy(unpack_positions(stored[name + GAPS].numpy()))
    if len(positions) != len(values) or (len(positions) and int(positions[-1]) >= dense.numel()):
        raise ValueError(f"The positions of {name!r} do not fit its values and shape. Write the file again.")
    dense.reshape(-1)[positions] = values
    return dense


def safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("Compressed files need safetensors: pip install safetensors") from error
    return safetensors.torch


def to_dense(model: nn.Module) -> nn.Module:
    """Return a copy of a converted model made of torch's own layers, zeros included, as other tools expect."""
    holder = nn.Sequential(copy.deepcopy(model))
    for module in list(holder.modules()):
        if isinstance(module, SparseLayer):
            dense = module.to_dense()
            replace(holder, module, nn.Sequential(dense, nn.ReLU()) if module.relu else dense)
        elif isinstance(module, Affine):
            replace(holder, module, DenseAffine(module))
    forget_order(holder)
    return holder[0]


class DenseAffine(nn.Module):
    """What `Affine` computes, in torch's own operations."""

    scale: Tensor
    shift: Tensor

    def __init__(self, affine: Affine):
        super().__init__()
        self.register_buffer("scale", affine.scale)
        self.register_buffer("shift", affine.shift)
        self.relu = affine.relu

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *(1 for _ in x.shape[2:]))
        y = x * self.scale.reshape(shape) + self.shift.reshape(shape)
        return y.relu() if self.relu else y


def export_onnx(model: nn.Module, example_input: Any, path: str | os.PathLike) -> None:
    """Write a model (dense with zeros, converted, or shrunk) as ONNX, with dense weights.

    ONNX has no sparse convolution; a runtime gains from the zeros only if it looks for them, but always from
    `remove_dead_units`.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("torch writes ONNX with the help of onnxscript: pip install onnx onnxscript")
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    torch.onnx.export(to_dense(model).eval(), arguments, os.fspath(path), dynamo=True, external_data=False)
