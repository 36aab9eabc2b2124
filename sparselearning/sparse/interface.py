"""What the sparse kernels are called with, and whether this installation has them.

`call` is the only door to the kernels. It passes each tensor with its length, and C++ compares all lengths, sizes and
indices with the layer's shape before it reads or writes anything (native/kernels/checks.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparselearning.native import library
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.native.library import REBUILD, Library

DTYPES = {torch.float32: "float", torch.float64: "double"}
INDICES = {"start", "column", "order", "to_start", "to_column", "to_order"}  # int32 tensors, of any struct
NUMBERS = {
    "value",
    "bias",
    "x",
    "dy",
    "scale",
    "shift",
    "mean",
    "variance",
    "dscale",
    "dshift",
    "dbias",
    "residual",
    "result",
}
OTHERS = dict.fromkeys(INDICES, torch.int32) | {"place": torch.uint8}
COUNTS = {name: f"{name}_count" for name in {*OTHERS, *NUMBERS}}
PLAIN = (Tensor, nn.Parameter)
MOST = 2**31 - 1  # of any size that the kernels take
keep_memory = functools.cache(keep_freed_memory)


def fields(names: str, kind: type = ctypes.c_int64) -> list[tuple[str, type]]:
    """Return fields of one type for a struct of native/kernels/interface.h."""
    return [(name, kind) for name in names.split()]


def spans(names: str) -> list[tuple[str, type]]:
    """Return the fields of tensors: the address of each, and how many numbers lie there."""
    return [field for name in names.split() for field in ((name, ctypes.c_void_p), (COUNTS[name], ctypes.c_int64))]


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
        *spans("start column order value bias x dy residual result dbias place"),
        *fields("window_y window_x relu checked"),
    )


class Sorting(ctypes.Structure):
    """The nonzeros of a weight, and where they go in the order of the input gradient."""

    _fields_ = (("conv", Conv), *spans("start column to_start to_column to_order"))


class Affine(ctypes.Structure):
    """A scale and a shift of each channel."""

    _fields_ = (*spans("x scale shift result"), *fields("outer channels inner relu"))


class Transposition(ctypes.Structure):
    """A matrix, and where its transpose goes."""

    _fields_ = (*spans("x result"), *fields("rows columns"))


class Normalisation(ctypes.Structure):
    """A batch normalisation by the statistics of the batch, or its gradients."""

    _fields_ = (
        *spans("x dy scale shift mean variance result dscale dshift"),
        *fields("channels inner"),
        ("eps", ctypes.c_double),
    )


class Pooling(ctypes.Structure):
    """A pooling by the largest number, or its gradient."""

    _fields_ = (*spans("x dy result place"), *fields("window_y window_x channels height width inner relu"))


class Sliding(ctypes.Structure):
    """A pooling by the largest number in planes that lie by rows, of windows that may overlap."""

    _fields_ = (
        *spans("x result"),
        *fields("planes height width out_height out_width kernel_y kernel_x stride_y stride_x pad_y pad_x"),
    )


class Averaging(ctypes.Structure):
    """The mean of each plane."""

    _fields_ = (*spans("x result"), *fields("planes pixels inner"))


class Patch(ctypes.Structure):
    """A field of a function's arguments that is another address in each call: slots[slot] + offset."""

    _fields_ = (*fields("field slot offset"),)


class Entry(ctypes.Structure):
    """A function of a list, and its arguments."""

    _fields_ = (
        *fields("function arguments", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("patches", ctypes.POINTER(Patch)),
        ("count", ctypes.c_int64),
    )


STRUCTS = {  # Layer for all other kernels
    "affine": Affine,
    "transpose": Transposition,
    "transpose_rows": Sorting,
    "normalise": Normalisation,
    "normalise_gradient": Normalisation,
    "pool": Pooling,
    "pool_gradient": Pooling,
    "pool_planes": Sliding,
    "average_planes": Averaging,
}


@functools.cache
def check_structs(loaded: Library) -> None:
    """Raise an ImportError if the library was built with other structs than these."""
    kinds = (Layer, Sorting, Affine, Transposition, Normalisation, Pooling, Sliding, Averaging, Patch, Entry)
    ours = [ctypes.sizeof(kind) for kind in kinds]
    if loaded.sizes[1:] != ours:
        raise ImportError(f"{loaded.path.name} has structs of {loaded.sizes[1:]} bytes, not {ours}. {REBUILD}")


if library.LIBRARY is not None:
    check_structs(library.LIBRARY)


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


def dispatch_of(kind: type) -> object:
    return getattr(kind, "__torch_dispatch__", None)


def in_one_piece(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as the kernels read it: its numbers in one piece of a CPU's memory, in whatever order.

    Raises:
        TypeError: for another dtype or device, or a tensor that is none of torch's own.
    """
    if dispatch_of(type(tensor)) is not dispatch_of(Tensor):
        raise TypeError(f"Expected {name} of a sparse kernel as a plain tensor, got a {type(tensor).__name__}.")
    if tensor.dtype is not dtype or not tensor.is_cpu or tensor.layout is not torch.strided:
        found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise TypeError(f"Expected {name} of a sparse kernel as {dtype}, dense and on the CPU; got {found}.")
    tensor = tensor.resolve_neg()
    return tensor if tensor.dim() and tensor.movedim(0, -1).is_contiguous() else tensor.contiguous()


def call(name: str, result: Tensor | None = None, **given) -> None:
    """Run a kernel that writes `result`. `given` are fields of its struct: tensors, numbers, a Conv, or None.

    Raises:
        TypeError: for tensors that the kernels cannot read.
        ValueError: for sizes, lengths or indices that do not fit together.
    """
    dtype, suffix = torch.float32, ""
    if result is not None:
        dtype, given["result"] = result.dtype, result
        if dtype not in DTYPES:
            raise TypeError(
                f"Sparse layers compute in float32 or float64, got {dtype}. Convert the input or the layer."
            )
        suffix = "_" + DTYPES[dtype]
    arguments, copies = {}, {}
    for key, field in given.items():
        wanted = OTHERS.get(key, dtype)
        if isinstance(field, Tensor):
            plain = type(field) in PLAIN and field.dtype is wanted and field.is_cpu and not field.is_neg()
            if not (plain and field.is_contiguous()):
                field = in_one_piece(key, field, wanted)
                copies[key] = field
            arguments[key], arguments[COUNTS[key]] = address, count = field.data_ptr(), field.numel()
            if count and (not address or field.untyped_storage().nbytes() < count * field.itemsize):
                raise ValueError(f"Expected {count} numbers in {key} of a sparse kernel; its memory was taken away.")
        elif field is not None:
            arguments[key] = field
    kernel = STRUCTS.get(name, Layer)(**arguments)
    kernels().call(f"sl_{name}{suffix}", kernel)
    if (calls := getattr(WATCHED, "calls", None)) is not None:
        tensors = {key: field for key, field in given.items() if isinstance(field, Tensor)}
        calls.append(Kernel(f"sl_{name}{suffix}", kernel, tensors | copies))


@dataclass
class Kernel:
    """A call of a kernel: its function, its arguments, and the tensors whose addresses are among them."""

    name: str
    arguments: ctypes.Structure
    tensors: dict[str, Tensor]

    def address(self) -> int | None:
        return kernels().address(self.name)


WATCHED = threading.local()


@contextlib.contextmanager
def watched() -> Iterator[list[Kernel]]:
    """Return a list to which the kernels that this thread calls are added."""
    outer, WATCHED.calls = getattr(WATCHED, "calls", None), []
    try:
        yield WATCHED.calls
    finally:
        WATCHED.calls = outer


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
    first: whether the input and the output have the batch first in memory all the same.

    Raises:
        ValueError: if a size is negative or above 2^31 - 1, or a stride, dilation or `groups` is 0.
    """
    positive = (*kernel, *stride, *dilation, groups)
    given = (batch, in_channels, height, width, out_channels, *padding, *positive)
    if not all(isinstance(size, int) and 0 <= size <= MOST for size in given) or not all(positive):
        raise ValueError(
            f"Expected sizes of a convolution from 0 to {MOST}, and from 1 on for the kernel {kernel}, "
            f"stride {stride}, dilation {dilation} and groups {groups}; "
            f"got an input of {(batch, in_channels, height, width)}, {out_channels} outputs and padding {padding}."
        )
    out_height, out_width = (
        (size + 2 * pad - step * (k - 1) - 1) // move + 1
        for size, k, move, pad, step in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    sizes = (batch, in_channels, height, width, out_channels, out_height, out_width)
    return Conv(*sizes, *kernel, *stride, *padding, *dilation, groups, batch_last, *first), out_height, out_width


def row_shape(batch: int, features: int, outputs: int, first=(False, False)) -> Conv:
    """Return a linear layer as a 1x1 convolution of one image, one pixel high and as wide as the batch."""
    one, zero = (1, 1), (0, 0)
    return conv_shape(1, features, 1, batch, outputs, one, one, zero, one, 1, False, first)[0]
