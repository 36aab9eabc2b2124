"""What a program does with inputs of one layout, laid out in advance: lists of kernels with nothing between them.

Python and torch take longer to reach a small kernel than the kernel takes: a third of the time of VGG-D for one image.
In a plan (planning.py makes them) the steps that are kernels alone are entries of lists, each of which one call of the
library runs. What they write lies in one piece of memory, a tensor where others lay that are no longer read; views of
it take no step. Every other step runs as it does without a plan.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselearning.sparse.interface import Entry, Kernel, Patch, kernels
from sparselearning.sparse.memory_order import is_turned, to_batch_first

CACHE_LINE = 64  # bytes


class Slot:
    """Where a call puts the result of a step, or an input."""

    def __init__(self, key: Any):
        self.key = key


def filled(given: Any, values: dict[Any, Any]) -> Any:
    """Return an argument with what a call has put into its slots."""
    if type(given) is Slot:
        return values[given.key]
    return [filled(part, values) for part in given] if type(given) is list else given


@dataclass(eq=False)
class Block:
    """Memory that kernels write: its bytes, the first and the last step that need it, and where a call has it."""

    bytes: int
    first: int
    last: int
    begin: int = 0

    @property
    def end(self) -> int:
        return self.begin + self.bytes

    def is_needed_with(self, other: Block) -> bool:
        """Return whether a step needs both."""
        return self.first <= other.last and other.first <= self.last


def lay_out(blocks: list[Block]) -> int:
    """Place blocks, large ones first, where none overlaps another that is needed with it; return the bytes of all."""
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda each: -each.bytes):
        block.begin = 0
        for other in sorted(filter(block.is_needed_with, placed), key=lambda each: each.begin):
            if block.end <= other.begin:
                break
            block.begin = max(block.begin, -(-other.end // CACHE_LINE) * CACHE_LINE)
        placed.append(block)
    return max((block.end for block in blocks), default=0)


@dataclass
class Held:
    """A tensor in a block, `offset` bytes from its beginning."""

    block: Block
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Tensor) -> Tensor:
        """Return the tensor in the memory of a call."""
        numbers = memory[self.block.begin : self.block.end].view(self.dtype)
        return numbers.as_strided(
            self.shape, self.stride, numbers.storage_offset() + self.offset // self.dtype.itemsize
        )


def address(x: Tensor) -> int:
    """Return where the memory begins in which x lies, alone or among others."""
    return x.untyped_storage().data_ptr()


def layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """Return what addresses of a tensor's numbers depend on."""
    return x.shape, x.stride(), x.dtype


@dataclass
class Step:
    """A step that is more than kernels, as `Program.steps` has it."""

    number: int
    run: Callable[..., Any]
    given: list[Any]
    named: dict[str, Any]
    needs: dict[Any, Held]  # what it takes of the memory
    done: list[int] = field(default_factory=list)
    slot: int = 0  # of its result, if kernels read that, which has then this layout
    layout: Any = None


Place = tuple[Block | int, int]  # of a tensor that kernels read or write: its block or slot, and bytes from there


@dataclass
class Kernels:
    """Kernels that run one after another, each with the places of its tensors by the names of its arguments."""

    calls: list[tuple[Kernel, dict[str, Place]]]
    done: list[int] = field(default_factory=list)
    entries: Any = None
    patches: list[Any] = field(default_factory=list)

    def write(self) -> None:
        """Write the list that the library runs, after all blocks have been placed."""
        self.entries = (Entry * len(self.calls))()
        for entry, (kernel, places) in zip(self.entries, self.calls, strict=True):
            patches = (Patch * len(places))(*(patch(kernel, *each) for each in places.items()))
            self.patches.append(patches)
            entry.function, entry.arguments = kernel.address(), ctypes.addressof(kernel.arguments)
            entry.bytes = ctypes.sizeof(kernel.arguments)
            entry.patches, entry.count = patches, len(patches)

    def run(self, slots: Any) -> None:
        kernels().call("sl_run", self.entries, len(self.entries), slots)


def patch(kernel: Kernel, name: str, place: Place) -> Patch:
    where, offset = place
    slot, offset = (0, where.begin + offset) if isinstance(where, Block) else (where, offset)
    return Patch(getattr(type(kernel.arguments), name).offset, slot, offset)


class OtherLayout(Exception):
    """A step gave a tensor of another layout than in the call that was watched."""


@dataclass
class Plan:
    """The items of a program, for inputs of one layout. Several threads may call it."""

    items: list[Step | Kernels]
    inputs: dict[Any, int]  # key -> slot
    constants: dict[int, Any]  # what steps give that depends on shapes alone
    returned: list[Any]  # the keys of what the program returns
    held: dict[Any, Held]  # what of these lies in the memory
    slots: int
    bytes: int

    def __call__(self, values: dict[Any, Any], memory: Tensor) -> None:
        """Put what the program returns into `values`, which has the inputs; `memory` has `bytes` bytes or more.

        Raises:
            OtherLayout: if a step gives what the kernels after it were not laid out for.
        """
        slots = (ctypes.c_void_p * self.slots)(memory.data_ptr())
        for key, slot in self.inputs.items():
            slots[slot] = values[key].data_ptr()
        values.update(self.constants)
        for item in self.items:
            if isinstance(item, Kernels):
                item.run(slots)
            else:
                take(item, values, memory, slots)
            for index in item.done:
                values.pop(index, None)
        for key in self.returned:
            y = self.held[key].of(memory) if key in self.held else values[key]
            if isinstance(y, Tensor) and address(y) == memory.data_ptr():
                y = to_batch_first(y) if is_turned(y) else y.clone()
            values[key] = y


def take(step: Step, values: dict[Any, Any], memory: Tensor, slots: Any) -> None:
    """Run a step that is more than kernels."""
    for key, held in step.needs.items():
        values[key] = held.of(memory)
    named = {key: filled(each, values) for key, each in step.named.items()}
    values[step.number] = y = step.run(*filled(step.given, values), **named)
    if step.slot:
        if layout(y) != step.layout:
            raise OtherLayout
        slots[step.slot] = y.data_ptr()
