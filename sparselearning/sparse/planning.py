"""How plans (plans.py) are made: from one call of a program, whose kernels are watched."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparselearning.sparse.dispatch import unobserved
from sparselearning.sparse.interface import Kernel, Layer, watched
from sparselearning.sparse.plans import (
    Block,
    Held,
    Kernels,
    OtherLayout,
    Place,
    Plan,
    Slot,
    Step,
    address,
    filled,
    lay_out,
    layout,
)

MOST_LAYOUTS = 64
OF_SIZES = ("operator.", "torch.sym_", "aten.sym_")  # steps that make numbers of shapes
UNSTEADY = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
WRITTEN = ("result", "place")  # what kernels write
SEEN = "seen"


class Program(Protocol):
    """What plans are made of: see programs.py."""

    description: dict[str, Any]
    stored: dict[str, list[Any]]
    steps: list[Any]
    results: Any


class Plans:
    """The plans of a program, by the layouts of its inputs. Those that come a second time get one, if they can.

    A copy of a program has none at first, because plans hold the addresses of the program's tensors.
    """

    def __init__(self):
        self.known: dict[Any, Any] = {}  # layouts -> SEEN, a plan, or None where there can be none
        self.spare: list[Tensor] = []
        self.lock = threading.Lock()

    def __reduce__(self):
        return Plans, ()

    def run(self, program: Program, values: dict[Any, Any]) -> bool:
        """Put what the program returns into `values`, which has its inputs; return whether that was done."""
        key = layouts_of(values)
        if key is None:
            return False
        if key not in self.known:
            self.keep(key, SEEN)
            return False
        plan = self.known.get(key)
        if plan is SEEN:
            plan = checked_plan(program, values)
            self.keep(key, plan)
        if plan is None:
            return False
        own = dict(values)
        memory = self.memory_of(plan.bytes)
        try:
            plan(own, memory)
        except OtherLayout:
            self.keep(key, None)
            return False
        self.spare = [memory]
        values.update(own)
        return True

    def memory_of(self, size: int) -> Tensor:
        """Return the memory of the last call if it is large enough and no other thread has it, or else new one.

        The system would give large memory anew to each call, page by page.
        """
        try:
            memory = self.spare.pop()
        except IndexError:
            memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        return memory if memory.nbytes >= size else torch.empty(size, dtype=torch.uint8, device="cpu")

    def keep(self, key: Any, found: Any) -> None:
        """Keep what was found for these layouts, and forget the oldest where there are too many."""
        with self.lock:
            self.known.pop(key, None)
            self.known[key] = found
            if len(self.known) > MOST_LAYOUTS:
                del self.known[next(iter(self.known))]


def layouts_of(inputs: dict[Any, Any]) -> Any:
    """Return the layouts of a program's inputs; None if anything but their numbers is to be looked at."""
    if not inputs or torch.is_autocast_enabled("cpu") or not all(map(is_ordinary, inputs.values())):
        return None
    return tuple(map(layout, inputs.values()))


def is_ordinary(x: Tensor) -> bool:
    """Return whether the numbers of x lie where it says, and nothing watches what is done with it."""
    return unobserved(x) and not (x.is_neg() or x.is_conj()) and x.untyped_storage().nbytes() >= x.nbytes > 0


def checked_plan(program: Program, inputs: dict[Any, Any]) -> Plan | None:
    """Return a plan that gives what the program gives, to the bit, for these inputs; None if there is none."""
    values, own = dict(inputs), dict(inputs)
    try:
        plan = Watcher(program).planned(values)
        plan(own, torch.empty(plan.bytes, dtype=torch.uint8, device="cpu"))
    except (Unplannable, OtherLayout):
        return None
    return plan if all(same(values[key], own[key]) for key in slots_in(program.results)) else None


def same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor):
        return x is y or x == y
    if layout(x)[0::2] != layout(y)[0::2]:
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (x, y)))


class Unplannable(Exception):
    """A program may do something else when it is called again with inputs of the same layouts."""


class Watcher:
    """One call of a program, and the plan that grows from it."""

    def __init__(self, program: Program):
        self.program = program
        self.stored = {address(each) for kind in program.stored.values() for part in kind for each in tree_leaves(part)}
        self.items: list[Step | Kernels] = []
        self.blocks: list[Block] = []
        self.held: dict[Any, Held] = {}
        self.behind: dict[Any, set[Block]] = {}  # in which values lie
        self.slots: dict[Any, int] = {}  # of values that kernels read, and that lie in no block
        self.constants: dict[int, Any] = {}

    def planned(self, values: dict[Any, Any]) -> Plan:
        """Put what the program returns into `values`, which has the inputs, and return a plan that does the same.

        Raises:
            Unplannable: if it may do something else the next time.
        """
        inputs = list(values)
        for now, (number, run, given, named, done) in enumerate(self.program.steps):
            taken = {key: values[key] for key in slots_in([given, *named.values()])}
            with watched() as calls:
                named_values = {key: filled(each, values) for key, each in named.items()}
                values[number] = y = run(*filled(given, values), **named_values)
            self.need(taken, now)
            if not (self.is_constant(number, y) or self.is_view(number, y, taken)):
                kernels = self.kernels_of(calls, taken, now)
                if calls and kernels is not None and address(y) in kernels[1]:
                    self.add_kernels(number, y, *kernels)
                else:
                    self.add_step(Step(number, run, given, named, {}), y, taken)
            for index in done:
                del values[index]
            if self.items:
                self.items[-1].done += done
        returned = list(slots_in(self.program.results))
        self.need(returned, len(self.program.steps))
        return self.made(inputs, returned)

    def made(self, inputs: list[Any], returned: list[Any]) -> Plan:
        """Return the plan, after the last step."""
        size = lay_out(self.blocks)
        for item in self.items:
            if isinstance(item, Kernels):
                item.write()
            else:
                item.slot = self.slots.get(item.number, 0)
        return Plan(
            self.items,
            {key: self.slots[key] for key in inputs if key in self.slots},
            self.constants,
            returned,
            {key: self.held[key] for key in returned if key in self.held},
            len(self.slots) + 1,
            size,
        )

    def need(self, keys: Any, now: int) -> None:
        """Note that a step needs these values."""
        for key in keys:
            for block in self.behind.get(key, ()):
                block.last = now

    def is_constant(self, number: int, y: Any) -> bool:
        """Return whether a step made a number of sizes, which needs no step then."""
        name = self.program.description["steps"][number][0]
        if isinstance(y, bool | int | float) and name.startswith(OF_SIZES):
            self.constants[number] = y
            return True
        return False

    def is_view(self, number: int, y: Any, taken: dict[Any, Any]) -> bool:
        """Return whether a step gave a view of what kernels had written, which needs no step then."""
        if type(y) is not Tensor or not y.numel():
            return False
        for key in taken:
            if key in self.held and address(taken[key]) == address(y):
                self.hold(number, y, self.held[key].block)
                return True
        return False

    def hold(self, number: int, y: Tensor, block: Block) -> None:
        self.held[number] = Held(block, y.data_ptr() - address(y), *layout(y))
        self.behind[number] = {block}

    def kernels_of(
        self, calls: list[Kernel], taken: dict[Any, Any], now: int
    ) -> tuple[list[tuple[Kernel, dict[str, Place]]], dict[int, Block]] | None:
        """Return kernels with the places of their tensors, and the blocks that they write by address.

        None if they read what another operation of the step has made.
        """
        known = {address(x): (key, x) for key, x in taken.items() if isinstance(x, Tensor)}
        written: dict[int, Block] = {}
        found = []
        for kernel in calls:
            places: dict[str, Place] = {}
            for name, tensor in kernel.tensors.items():
                at = address(tensor)
                if at in known and name not in WRITTEN:
                    places[name] = self.place(*known[at], tensor)
                elif name in WRITTEN and at not in known and at not in self.stored:
                    block = written.setdefault(at, Block(tensor.untyped_storage().nbytes(), now, now))
                    places[name] = block, tensor.data_ptr() - at
                elif at in written:
                    places[name] = written[at], tensor.data_ptr() - at
                elif at not in self.stored and tensor.numel():
                    return None
            if isinstance(kernel.arguments, Layer) and not places.keys() & {"start", "column"}:
                kernel.arguments.checked = True  # these indices are the program's own, and this call has checked them
            found.append((replace(kernel, tensors={}), places))
        return found, written

    def place(self, key: Any, x: Tensor, tensor: Tensor) -> Place:
        """Return where a tensor is that lies in the memory of value `key`, which is x."""
        if key in self.held:
            return self.held[key].block, tensor.data_ptr() - address(x)
        return self.slots.setdefault(key, len(self.slots) + 1), tensor.data_ptr() - x.data_ptr()

    def add_kernels(self, number: int, y: Tensor, calls: list, written: dict[int, Block]) -> None:
        self.blocks += written.values()
        self.hold(number, y, written[address(y)])
        if not (self.items and isinstance(self.items[-1], Kernels)):
            self.items.append(Kernels([]))
        self.items[-1].calls += calls  # pyright: ignore[reportAttributeAccessIssue]

    def add_step(self, step: Step, y: Any, taken: dict[Any, Any]) -> None:
        """Add a step that is more than kernels.

        Raises:
            Unplannable: if it gives numbers, or what depends on numbers of its inputs in another way than they do.
        """
        leaves = [leaf for leaf in tree_leaves(y) if leaf is not None]
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or UNSTEADY & {*getattr(step.run, "tags", ())}:
            raise Unplannable
        step.needs = {key: self.held[key] for key in taken if key in self.held}
        step.layout = layout(y) if isinstance(y, Tensor) else None
        addresses = {address(leaf) for leaf in leaves}
        self.behind[step.number] = {
            block
            for key, x in taken.items()
            if addresses & {address(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}
            for block in self.behind.get(key, ())
        }
        self.items.append(step)


def slots_in(given: Any) -> Iterator[Any]:
    """Yield the keys of what a call puts into arguments."""
    if type(given) is Slot:
        yield given.key
    elif type(given) is list:
        for part in given:
            yield from slots_in(part)
