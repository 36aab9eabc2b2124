"""What the operators may be given; everything else is refused before it reaches a kernel, by real and fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparselearning.sparse.interface import DTYPES, MOST

Tensors = tuple[Tensor, ...]


def check_tensors(
    x: Tensor, value: Tensor | None, bias: Tensor | None, starts: Tensors, columns: Tensors, *others: Tensor
) -> None:
    """Check dtypes, devices and lengths of a layer's tensors. The first of `starts` has the rows of the bias.

    Of the columns of a layer and its turned indices, (column, t_column, t_order), the last two may be empty.

    Raises:
        TypeError: for a dtype that the kernels do not compute in, or tensors of different dtypes or devices.
        ValueError: for indices that do not belong together.
        RuntimeError: for a bias of another length.
    """
    check_dtypes(x, value, bias, *others)
    check_device(x, value, bias, *others, *starts, *columns)
    for index in (*starts, *columns):
        if index.dtype != torch.int32 or index.dim() != 1:
            raise ValueError(
                "A sparse layer needs one-dimensional int32 indices; got "
                f"{index.dtype} of shape {tuple(index.shape)}. Make them with SparseLinear.from_dense."
            )
    if len(columns) == 3 and are_left_out(*columns):
        columns = columns[:1]
    count = columns[0].shape if value is None else value.shape
    if columns[0].shape != count or columns[-1].shape != count or columns[len(columns) // 2].shape != count:
        shapes = [tuple(column.shape) for column in columns]
        raise ValueError(f"A sparse layer needs one column for each value; got {tuple(count)} values and {shapes}.")
    if not all(start.shape[0] for start in starts):
        raise ValueError("A sparse layer needs a start for each row and one more; got none.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != starts[0].shape[0] - 1):
        raise RuntimeError(f"Expected a bias of shape ({starts[0].shape[0] - 1},), got {tuple(bias.shape)}.")


def are_left_out(column: Tensor, t_column: Tensor, t_order: Tensor) -> bool:
    """Return whether a layer is without its turned indices, which only gradients of its input read."""
    return column.shape[0] > 0 and t_column.shape[0] == 0 and t_order.shape[0] == 0


def check_dtypes(x: Tensor, *others: Tensor | None) -> None:
    if x.dtype not in DTYPES or any(other is not None and other.dtype != x.dtype for other in others):
        found = ", ".join(str(tensor.dtype) for tensor in (x, *others) if tensor is not None)
        raise TypeError(
            f"Sparse layers compute in float32 or float64, input and parameters alike; got {found}. "
            "Convert the input or the layer."
        )


def check_device(x: Tensor, *others: Tensor | None) -> None:
    if any(other is not None and other.device != x.device for other in others):
        found = ", ".join(str(tensor.device) for tensor in (x, *others) if tensor is not None)
        raise TypeError(f"Sparse layers compute on one device; got tensors on {found}. Move the input or the layer.")


def check_rows(x: Tensor, features: int | None = None, outputs: int = 0) -> None:
    """Check the shape of a linear layer's input, or that of its gradient.

    Raises:
        RuntimeError: as nn.Linear does.
    """
    if x.dim() != 2:
        raise RuntimeError(f"Expected (rows, features) of a sparse linear operator, got shape {tuple(x.shape)}.")
    if features is not None and x.shape[1] != features:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({x.shape[0]}x{x.shape[1]} and {features}x{outputs}): "
            f"expected rows of {features} features"
        )


def check_images(x: Tensor) -> None:
    if x.dim() != 4:
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(x.shape)}"
        )


def check_geometry(kernel, stride, padding, dilation, groups) -> None:
    """Check the numbers of a convolution.

    Raises:
        ValueError: for other than two of each, numbers out of range, or groups below 1.
    """
    pairs = dict(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or not all(least <= size <= MOST for size in pair):
            raise ValueError(f"Expected {name} as two numbers from {least} to {MOST}, got {list(pair)}.")
    if not 1 <= groups <= MOST:
        raise ValueError(f"Expected groups from 1 to {MOST}, got {groups}.")


def out_size(input_shape: Sequence[int], kernel, stride, padding, dilation, groups) -> list[int]:
    """Return height and width of a convolution's output.

    Raises:
        RuntimeError: as nn.Conv2d does, for a kernel that is larger than the padded input.
    """
    padded = [size + 2 * pad for size, pad in zip(input_shape[2:], padding, strict=True)]
    reach = [step * (k - 1) + 1 for step, k in zip(dilation, kernel, strict=True)]
    if not all(input_shape[2:]) and all(input_shape[:2]):
        raise RuntimeError(
            f"Only zero batch or zero channel inputs are supported, but got input shape: {list(input_shape)}"
        )
    if any(r > size for r, size in zip(reach, padded, strict=True)):
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
            f"Kernel size: ({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )
    return [(size - r) // move + 1 for size, r, move in zip(padded, reach, stride, strict=True)]


def output_shape(shape: Sequence[int], out_channels: int, planes: int, geometry) -> tuple[int, ...]:
    """Return the shape of a convolution's output. `planes` is the number of rows that its transposed weight has.

    Raises:
        RuntimeError: as nn.Conv2d does for a wrong number of channels or too large a kernel.
        ValueError: for a geometry that no convolution has, or that the weight was not made for.
    """
    check_geometry(*geometry)
    if len(shape) != 4 or any(size < 0 for size in shape):
        raise ValueError(f"Expected the shape of an input as four numbers from 0 on, got {list(shape)}.")
    kernel, stride, _, _, groups = geometry
    phases = stride[0] * stride[1]
    channels = planes // phases
    if planes % phases or channels % groups or out_channels % groups:
        raise ValueError(
            f"A weight of {planes} phase planes and {out_channels} rows was not made for stride {list(stride)} and "
            f"groups={groups}. Make the layer with SparseConv2d.from_dense."
        )
    if shape[1] != channels:
        weight = [out_channels, channels // groups, *kernel]
        raise RuntimeError(
            f"Given groups={groups}, weight of size {weight}, expected input{list(shape)} to have {channels} channels, "
            f"but got {shape[1]} channels instead"
        )
    return (shape[0], out_channels, *out_size(shape, *geometry))


def check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise RuntimeError(f"Expected {name} of shape {tuple(expected)}, got {tuple(tensor.shape)}.")


def check_affine(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Check what a scale and a shift of each channel are given.

    Raises:
        TypeError, RuntimeError: for dtypes, devices or lengths that do not belong together.
    """
    check_dtypes(x, scale, shift)
    check_device(x, scale, shift)
    if x.dim() < 2 or scale.shape != (x.shape[1],) or shift.shape != scale.shape:
        raise RuntimeError(
            "Expected an input (N, C, ...), and a scale and a shift of shape (C,); got "
            f"{tuple(x.shape)}, {tuple(scale.shape)} and {tuple(shift.shape)}."
        )


def check_indices(start: Tensor, column: Tensor, width: int) -> None:
    """Check the nonzeros of a weight whose rows have `width` entries, as the kernels do.

    Raises:
        ValueError: if they do not fit.
    """
    ends = [int(start[0]), int(start[-1])] if len(start) else []
    rising = bool((start.diff() >= 0).all())
    inside = bool(((column >= 0) & (column < width)).all())
    if ends != [0, len(column)] or not rising or not inside:
        raise ValueError("The indices of a sparse layer do not fit its shape; load a state_dict of the same layer.")


def numeric_padding(conv: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Return the padding of `conv` as numbers."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"Sparse convolutions pad with zeros; keep padding_mode={conv.padding_mode!r} dense.")
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            raise ValueError("padding='same' with an even kernel pads unevenly; keep this convolution dense.")
        return tuple(total // 2 for total in totals)
    return (0,) * len(conv.kernel_size)
