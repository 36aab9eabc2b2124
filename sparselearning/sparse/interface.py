"""What the sparse kernels are called with, and whether this installation has them."""

from __future__ import annotations

import ctypes
import functools

import torch

from sparselearning.native import library
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.native.library import Library

DTYPES = {torch.float32: "float", torch.float64: "double"}
keep_memory = functools.cache(keep_freed_memory)


def kernels() -> Library:
    """Return the kernels of this installation.

    Raises:
        RuntimeError: if it was built without a compiler.
    """
    if library.LIBRARY is None:
        raise RuntimeError(
            "sparselearning was installed without its sparse kernels. Install a C++ compiler and reinstall, "
            "or keep the model dense."
        )
    keep_memory()
    return library.LIBRARY


def available() -> bool:
    """Return whether sparse layers run on kernels here (else they compute with dense weights)."""
    return library.LIBRARY is not None


def call(name: str, dtype: torch.dtype, *arguments) -> None:
    """Run the kernel of this name for numbers of `dtype`."""
    kernels().call(f"sl_{name}_{DTYPES[dtype]}", *arguments)


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
):
    """Return the kernels' description of a convolution, and the height and width of its output.

    `first` says whether its input and its output are NCHW in memory although vectors go along the batch.
    """
    out_height, out_width = (
        (size + 2 * pad - step * (k - 1) - 1) // move + 1
        for size, k, move, pad, step in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    numbers = (batch, in_channels, height, width, out_channels, out_height, out_width, *kernel, *stride, *padding)
    numbers += (*dilation, groups, int(batch_last), *map(int, first))
    return (ctypes.c_int64 * len(numbers))(*numbers), out_height, out_width
