"""Positions as bytes, and the sparse layers of a converted model in a compressed file (files.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sparselearning.compact import positions, rows_of

ESCAPE = 255
VALUES, GAPS, SHAPE = ".sparse_values", ".sparse_gaps", ".sparse_shape"
ROWS = "~rows"  # ends the name of a sparse layer's rows, zeros included
MOST_DIMS = 64  # torch's own operations take no more
HEADER = 128  # bytes that the file's header takes for two more tensors, at the least


def pack_positions(positions: np.ndarray) -> np.ndarray:
    """Return ascending positions as bytes: the number of zeros before each, where a byte of 255 adds to the next one.

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


def shape_of(name: str, shape: Tensor) -> list[int]:
    """Return the shape that a file holds for a tensor."""
    if shape.dtype != torch.int64 or shape.dim() != 1 or len(shape) > MOST_DIMS or bool((shape < 0).any()):
        found = shape.tolist() if shape.numel() < 10 else f"{shape.numel()} numbers"
        raise ValueError(
            f"Expected the shape of {name!r} to be at most {MOST_DIMS} int64 numbers of at least 0, got {found} of "
            f"{shape.dtype}. Write the file again."
        )
    return shape.tolist()


def sparse_layers(entries: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes of the sparse layers in a state_dict, each with a value, a start and a column."""
    prefixes = [name.removesuffix("column") for name in entries if name == "column" or name.endswith(".column")]
    return [
        prefix
        for prefix in prefixes
        if {prefix + "value", prefix + "start"} <= entries.keys()
        and make_rows(*(entries[prefix + part] for part in ("value", "start", "column")))
    ]


def make_rows(value: Tensor, start: Tensor, column: Tensor) -> bool:
    """Return whether these are the values, starts and columns of rows, with ascending columns in each."""
    if not value.dim() == start.dim() == column.dim() == 1 or not value.is_floating_point() or not len(start):
        return False
    if not start.dtype == column.dtype == torch.int32 or len(value) != len(column):
        return False
    if int(start[0]) or int(start[-1]) != len(column) or bool((start.diff() < 0).any()) or bool((column < 0).any()):
        return False
    return bool((positions(start, column, width_of(column)).diff() > 0).all())


def width_of(column: Tensor) -> int:
    return int(column.max()) + 1 if len(column) else 0


def packed_rows(prefix: str, value: Tensor, start: Tensor, column: Tensor) -> dict[str, Tensor]:
    """Return the tensors that stand for a sparse layer in the file: its rows with zeros, where that is smaller."""
    shape = torch.Size((len(start) - 1, width_of(column)))
    position = positions(start, column, shape[1])
    gaps = torch.from_numpy(pack_positions(position.numpy()))
    size = value.element_size()
    if len(value) * size + len(gaps) + HEADER > shape.numel() * size and bool((value != 0).all()):
        return {prefix + ROWS: value.new_zeros(shape.numel()).scatter_(0, position, value).reshape(shape)}
    name = prefix + "column"
    return {prefix + "value": value.clone(), name + GAPS: gaps, name + SHAPE: torch.tensor(shape, dtype=torch.int64)}


def are_rows(name: str, stored: Mapping[str, Tensor]) -> bool:
    """Return whether a name in the file stands for a sparse layer, or for its starts and columns."""
    if name.endswith(ROWS):
        return True
    column = name.removesuffix(SHAPE)
    others = {name, column + GAPS, column.removesuffix("column") + "value"}
    return name.endswith("column" + SHAPE) and others <= stored.keys() and column + VALUES not in stored


def bytes_of_rows(name: str, stored: Mapping[str, Tensor]) -> int:
    """Return how many bytes starts and columns take, and the values where these have no name of their own."""
    tensor = stored[name]
    if name.endswith(ROWS):
        return tensor.numel() * (tensor.element_size() + 4) + 4 * (len(tensor) + 1 if tensor.dim() else 0)
    return 4 * (rows_and_width(name, tensor)[0] + 1 + stored[name.removesuffix(SHAPE) + GAPS].numel())


def rows_and_width(name: str, shape: Tensor) -> list[int]:
    sizes = shape_of(name.removesuffix(SHAPE), shape)
    if len(sizes) != 2 or max(sizes) >= 2**31:
        raise ValueError(f"Expected rows and width of {name.removesuffix(SHAPE)!r}, got {sizes}. Write the file again.")
    return sizes


def unpacked_rows(name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values, starts and columns of a sparse layer; only starts and columns if its values have a name."""
    if name.endswith(ROWS):
        prefix, dense = name.removesuffix(ROWS), stored[name]
        if dense.dim() != 2 or not dense.is_floating_point():
            raise ValueError(f"Expected the rows {name!r} as a matrix of numbers. Write the file again.")
        if twice := [part for part in ("value", "start", "column") if prefix + part in stored]:
            raise ValueError(f"The file holds {prefix + twice[0]!r} twice, alone and in {name!r}. Write it again.")
        position = dense.flatten().nonzero().flatten()
        start, column = rows_of(position, dense.shape)
        return {prefix + "value": dense.flatten()[position], prefix + "start": start, prefix + "column": column}
    column_name, shape = name.removesuffix(SHAPE), torch.Size(rows_and_width(name, stored[name]))
    prefix = column_name.removesuffix("column")
    gaps, value = stored[column_name + GAPS], stored[prefix + "value"]
    fitting = gaps.dtype == torch.uint8 and gaps.dim() == value.dim() == 1
    position = torch.from_numpy(unpack_positions(gaps.numpy())) if fitting else torch.empty(0, dtype=torch.int64)
    wrong = not fitting or len(position) != len(value) or (len(gaps) and int(gaps[-1]) == ESCAPE)
    if wrong or (len(position) and int(position[-1]) >= shape.numel()):
        raise ValueError(f"The positions of {column_name!r} do not fit its values and shape. Write the file again.")
    start, column = rows_of(position, shape)
    return {column_name: column, prefix + "start": start}
