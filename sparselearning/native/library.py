"""The compiled library of this package, which applies masks and computes sparse layers."""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path

import torch  # loads the OpenMP library whose threads the kernels run on

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
INTERFACE = 8  # of kernels/interface.h
STRUCTS = 11  # whose sizes the library tells
FAILURES = {  # by what a function returns: Status of kernels/interface.h
    1: (ValueError, "The indices of a sparse layer do not fit its shape; load a state_dict of the same layer."),
    2: (MemoryError, "The sparse kernels ran out of memory."),
    3: (ValueError, "A layer this large has no sparse kernel; leave it dense."),
    4: (ValueError, "The tensors of a sparse layer do not have the sizes that its shape asks for."),
}
REBUILD = "Reinstall sparselearning (pip install --force-reinstall, or python setup.py build_ext --inplace)."


class Machine(ctypes.Structure):
    """What a function runs on."""

    _fields_ = (
        ("instruction_set", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("fork", ctypes.c_void_p),
        ("awake", ctypes.c_int64),
    )


class Library:
    """A built library, loaded with ctypes. `instruction_set` is an index into INSTRUCTION_SETS and can be changed.

    Raises:
        ImportError: if the library was built from other sources than this file belongs to.
    """

    def __init__(self, path: Path):
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.sizes = self.check_interface()
        # The threads of torch's own pool: a second OpenMP pool would spin on the same cores.
        fork = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        self.fork = ctypes.cast(fork, ctypes.c_void_p) if fork else None
        self.instruction_set = self.best = self.functions.sl_instruction_set()
        wanted = os.environ.get("SPARSELEARNING_ISA")
        if wanted is not None:
            self.instruction_set = self.index_of(wanted)

    def check_interface(self) -> list[int]:
        """Return the sizes of the library's structs: Machine, and those of sparse/interface.py."""
        sizes, version = (ctypes.c_int64 * STRUCTS)(), None
        if function := getattr(self.functions, "sl_interface", None):  # before version 2 there was none
            function.restype = ctypes.c_int64
            version = function(sizes)
        if version != INTERFACE or sizes[0] != ctypes.sizeof(Machine):
            raise ImportError(
                f"{self.path.name} was built from other sources than this package: it has interface {version}, "
                f"and interface {INTERFACE} is needed. {REBUILD}"
            )
        return list(sizes)

    def index_of(self, name: str) -> int:
        """Return the index of an instruction set that this processor has."""
        allowed = INSTRUCTION_SETS[: self.best + 1]
        if name not in allowed:
            raise ValueError(f"Unknown or unsupported SPARSELEARNING_ISA {name!r}. Choose one of {allowed}.")
        return INSTRUCTION_SETS.index(name)

    def call(self, name: str, *arguments) -> None:
        """Call a function on structs, arrays and integers.

        It runs on the threads that torch may use.

        Raises:
            ValueError, MemoryError: see FAILURES.
        """
        machine = Machine(self.instruction_set, torch.get_num_threads(), self.fork)
        status = getattr(self.functions, name)(ctypes.byref(machine), *map(native, arguments))
        if status:
            kind, message = FAILURES[status]
            raise kind(message)

    def address(self, name: str) -> int | None:
        """Return the address of a function, for a list of several."""
        return ctypes.cast(getattr(self.functions, name), ctypes.c_void_p).value


def native(argument):
    """Return what ctypes takes for a struct, an array or an integer."""
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.byref(argument)


def load() -> Library | None:
    """Return the library beside this file, or None if the package was installed without a compiler."""
    places = [Path(__file__).with_name("_native" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = next((place for place in places if place.exists()), None)
    return None if built is None else Library(built)


LIBRARY = load()
