"""The compiled kernels, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import torch
from torch import Tensor

from sparselearning.allocator import keep_freed_memory

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
DTYPES = {torch.float32: "float", torch.float64: "double"}
FAILURES = {
    1: (ValueError, "The indices of a sparse layer do not fit its shape; load a state_dict of the same layer."),
    2: (MemoryError, "The sparse kernels ran out of memory."),
    3: (ValueError, "A layer this large has no sparse kernel; leave it dense."),
}


class Library:
    """Calls into the kernels; `instruction_set` is an index into INSTRUCTION_SETS."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path))
        # The threads of torch's own pool: a second OpenMP pool would spin on the same cores.
        fork = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self.fork = ctypes.cast(fork, ctypes.c_void_p) if fork else None
        self.instruction_set = self.best = self.functions.sl_instruction_set()
        wanted = os.environ.get("SPARSELEARNING_ISA")
        if wanted is not None:
            self.instruction_set = self.index_of(wanted)

    def index_of(self, name: str) -> int:
        allowed = INSTRUCTION_SETS[: self.best + 1]
        if name not in allowed:
            raise ValueError(f"Unknown or unsupported SPARSELEARNING_ISA {name!r}. Choose one of {allowed}.")
        return INSTRUCTION_SETS.index(name)

    def call(self, name: str, dtype: torch.dtype, *arguments) -> None:
        """Run `name` on tensors (by address), integers and shapes, with the threads torch may use."""
        function = getattr(self.functions, f"sl_{name}_{DTYPES[dtype]}")
        arguments += (self.instruction_set, torch.get_num_threads(), self.fork)
        self.check(function(*map(native, arguments)))

    def transpose_rows(self, shape, start: Tensor, column: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (start, column, order): the nonzeros sorted by (input channel, phase of the stride)."""
        to_start = start.new_empty(rows + 1)
        to_column, order = torch.empty_like(column), torch.empty_like(column)
        arguments = (shape, start, column, to_start, to_column, order)
        self.check(self.functions.sl_transpose_rows(*map(native, arguments)))
        return to_start, to_column, order

    @staticmethod
    def check(status: int) -> None:
        if status:
            kind, message = FAILURES[status]
            raise kind(message)


def native(argument):
    """Return what ctypes takes for a tensor, an integer, a shape or None."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, (int, bool)):
        return ctypes.c_int64(argument)
    return argument


def load() -> Library | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_kernels" + suffix)
        if path.exists():
            return Library(path)
    return None


LIBRARY = load()
keep_memory = functools.cache(keep_freed_memory)


def kernels() -> Library:
    """Return the kernels of this installation.

    Raises:
        RuntimeError: if it was built without a compiler.
    """
    if LIBRARY is None:
        raise RuntimeError(
            "sparselearning was installed without its sparse kernels. Install a C++ compiler and reinstall, "
            "or keep the model dense."
        )
    keep_memory()
    return LIBRARY


def available() -> bool:
    """Return whether sparse layers run on kernels here (else they compute with dense weights)."""
    return LIBRARY is not None


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
