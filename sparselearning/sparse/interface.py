"""What the sparse kernels are called with, and whether this installation has them."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sparselearning.native import library
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.native.library import Library

DTYPES = {torch.float32: "float", torch.float64: "double"}
keep_memory = functools.cache(keep_freed_memory)


def fields(names: str, kind: type = ctypes.c_int64) -> list[tuple[str, type]]:
    """Return fields of one type for a struct of native/kernels/interface.h."""
    return [(name, kind) for name in names.split()]


class Conv(ctypes.Structure):
    """A convolution, and the memory order of its activations."""

    _fields_ = (
        *fields("images in_channels height width out_channels out_height out_width"),
        *fields("kernel_y kernel_x stride_y stride_x pad_y pad_x dilation_y dilation_x groups"),
        *fields("batch_last x_first y_first"),
    )


class Layer(ctypes.Structure):
    """A sparse layer and the tensors of one call."""

    _fields_ = (
        ("conv", Conv),
        *fields("start column order value bias x dy result", ctypes.c_void_p),
        ("relu", ctypes.c_int64),
    )


class Affine(ctypes.Structure):
    """A scale and a shift of each channel."""

    _fields_ = (*fields("x scale shift result", ctypes.c_void_p), *fields("outer channels inner relu"))


class Transposition(ctypes.Structure):
    """A matrix, and where its transpose goes."""

    _fields_ = (*fields("x result", ctypes.c_void_p), *fields("rows columns"))


STRUCTS = {"affine": Affine, "transpose": Transposition}  # Layer for all other kernels


def kernels() -> Library:
    """Return the library that holds the kernels.

    Raises:
        RuntimeError: if the package was installed without a compiler.
    """
    if library.LIBRARY is None:
        raise RuntimeError(
            "sparselearning was installed without its sparse kernels. Install a C++ compiler and reinstall, "
            "or keep the model dense."
        )
    keep_memory()
    return library.LIBRARY


def available() -> bool:
    """Return whether this installation has kernels. Without them sparse layers compute with dense weights."""
    return library.LIBRARY is not None


def call(name: str, result: Tensor, **given) -> None:
    """Run a kernel that writes `result`. `given` are fields of its struct: tensors, numbers, a Conv, or None."""
    addresses = {key: field.data_ptr() if isinstance(field, Tensor) else field for key, field in given.items()}
    arguments = STRUCTS.get(name, Layer)(result=result.data_ptr(), **addresses)
    kernels().call(f"sl_{name}_{DTYPES[result.dtype]}", arguments)


@functools.lru_cache(maxsize=1024)
def conv_shape(
    batch,
    in_channels,
    height,
    width,
    out_channels,
    kernel,
    stride,
    padding,
    dilation,
    groups,
    batch_last,
    first=(False, False),
) -> tuple[Conv, int, int]:
    """Return a convolution as the kernels take it, and the height and width of its output.

    batch_last: whether vectors of the kernels go along the batch, and activations are CHWN in memory.
    first: with `batch_last`, whether the input and the output are NCHW in memory all the same.
    """
    out_height, out_width = (
        (size + 2 * pad - step * (k - 1) - 1) // move + 1
        for size, k, move, pad, step in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    sizes = (batch, in_channels, height, width, out_channels, out_height, out_width)
    return Conv(*sizes, *kernel, *stride, *padding, *dilation, groups, batch_last, *first), out_height, out_width


def row_shape(batch: int, features: int, outputs: int) -> Conv:
    """Return a linear layer as a 1x1 convolution of one image, one pixel high and as wide as the batch."""
    one, zero = (1, 1), (0, 0)
    return conv_shape(1, features, 1, batch, outputs, one, one, zero, one, 1, False)[0]
