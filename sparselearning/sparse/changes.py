"""Changes of a model's modules, of which those are made with which the model computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from sparselearning.sparse.report import LayerReport
from sparselearning.sparse.verification import MOST_RUNS, Verifier, keep_what_works

Swaps = list[tuple[nn.Module, nn.Module]]


def become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into what `other` is, wherever it is held: in attributes, lists or dicts."""
    state = dict(vars(other))
    vars(module).clear()
    vars(module).update(state)
    module.__class__ = other.__class__


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is in `model`."""
    become(old, new)


@dataclass(eq=False)
class Change:
    """Modules that become others. `ways` are tried in turn, each with a note; the first changes most."""

    name: str
    ways: list[tuple[str, Callable[[], Swaps]]]
    report: LayerReport | None = None  # of the layer that becomes sparse

    @classmethod
    def one_way(cls, name: str, swaps: Sequence[tuple[nn.Module, nn.Module]], report: LayerReport | None = None):
        """Return a change that has no simpler way."""
        return cls(name, [("", lambda: list(swaps))], report)

    def swaps(self, way: int) -> Swaps:
        """Return (module, what it becomes) of one of the ways."""
        return self.ways[way][1]()


@dataclass(frozen=True)
class Choice:
    """A change, in one of its ways."""

    change: Change
    way: int

    @property
    def note(self) -> str:
        return self.change.ways[self.way][0]

    def swaps(self) -> Swaps:
        return self.change.swaps(self.way)

    def simpler(self) -> list[Choice]:
        return [Choice(self.change, way) for way in range(self.way + 1, len(self.change.ways))]


class Applied:
    """Context manager in which choices are made; modules are as before after it."""

    def __init__(self, choices: list[Choice]):
        self.choices = choices

    def __enter__(self) -> None:
        self.before = [(old, copy.copy(old)) for choice in self.choices for old, _ in choice.swaps()]
        apply(self.choices)

    def __exit__(self, *_exception: object) -> None:
        for old, kept in self.before:
            become(old, kept)


def apply(choices: list[Choice]) -> None:
    for choice in choices:
        for old, new in choice.swaps():
            become(old, new)


def make(holder: nn.Module, changes: list[Change], verifier: Verifier) -> list[str]:
    """Make the changes with which the model computes the same, and note in the reports which are not made."""
    accepted, rejected = choose(holder, changes, verifier)
    apply(accepted)
    return noted(changes, accepted, rejected)


def choose(holder: nn.Module, changes: list[Change], verifier: Verifier) -> tuple[list[Choice], dict[Change, str]]:
    """Return the changes with which the model computes the same, and why others are not made."""
    reasons = []

    def differs(choices: list[Choice]) -> str:
        with Applied(choices):
            reasons.append(verifier.difference(holder))
        return reasons[-1]

    for way in range(max((len(change.ways) for change in changes), default=0)):
        choices = [Choice(change, min(way, len(change.ways) - 1)) for change in changes]
        found = keep_what_works(choices, differs, Choice.simpler, MOST_RUNS)
        if found is not None:
            accepted, rejected = found
            return accepted, {choice.change: why for choice, why in rejected.items()}
    return [], dict.fromkeys(changes, f"too many changes do: {reasons[0]}") if reasons else {}


def noted(changes: list[Change], accepted: list[Choice], rejected: dict[Change, str]) -> list[str]:
    """Write into the layers' reports what became of them; return notes on the changes that are not of a layer."""
    made = {choice.change: choice for choice in accepted}
    notes = []
    for change in changes:
        why = rejected.get(change, "")
        if change.report is not None:
            change.report.replaced = change in made
            if change in made:
                change.report.note = made[change].note + (f" ({why} otherwise)" if why else "")
            else:
                change.report.note = f"sparse, the model differs: {why}"
        elif change not in made:
            notes.append(f"{change.name} stays as it is: {why}")
    return notes
