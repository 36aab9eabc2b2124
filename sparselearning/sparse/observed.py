"""The gradients of a dense weight, as the steps of its active values used them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparselearning.compact import found, rows_of
from sparselearning.sparse.candidates import CandidateSet

SAMPLE = 2**16  # entries


@dataclass
class Pass:
    """A part of a weight's gradient: a layer's inputs and the gradients of its outputs, or a dense gradient.

    The gradient follows from the inputs and the outputs' gradients, so that all of it need never exist.
    """

    x: Tensor | None = None
    dy: Tensor | None = None
    dense: Tensor | None = None

    def rows(self, module: Any, first: int, last: int) -> Tensor:
        """Return the gradient of some rows of the weight's matrix, (last - first, width)."""
        if self.x is None or self.dy is None:
            assert self.dense is not None
            return self.dense.flatten(1)[first:last]
        return module.gradient_of_rows(self.x, self.dy, first, last)

    def at(self, module: Any, start: Tensor, column: Tensor) -> Tensor:
        """Return the gradient of some entries, (entries,); rows and columns as `Entries` has them."""
        if self.x is not None and self.dy is not None:
            return module.gradient_at(self.x, self.dy, start, column)
        assert self.dense is not None
        row = torch.repeat_interleave(torch.arange(len(start) - 1), start.diff().long())
        return self.dense.flatten(1)[row, column.long()]

    def norms(self, module: Any) -> tuple[Tensor, Tensor]:
        """Return how large inputs and outputs' gradients are, (width,) and (rows,): sums of magnitudes."""
        if self.x is None or self.dy is None:
            assert self.dense is not None
            size = self.dense.flatten(1).abs()
            return size.sum(0), size.sum(1)
        return module.norms(self.x, self.dy)


@dataclass
class Change:
    """What became of a gradient between its backward pass and the step: each entry times a factor, or clipped."""

    factor: float = 1.0
    bound: float | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return a gradient as the step used it, in place."""
        if self.bound is not None:
            gradient = gradient.clamp_(-self.bound, self.bound)
        return gradient if self.factor == 1 else gradient.mul_(self.factor)


class Before(NamedTuple):
    """What is kept of a gradient to tell how it is changed: some entries, of a short one all, and the largest."""

    some: Tensor
    largest: float  # magnitude; NaN if there is one

    @classmethod
    def of(cls, gradient: Tensor) -> Before:
        """Return what is kept of a gradient, (nonzeros,)."""
        some = gradient[:: len(gradient) // SAMPLE | 1].clone()  # odd: entries of a row often come in powers of two
        return cls(some, max(map(abs, torch.stack(gradient.aminmax()).tolist())) if len(gradient) else 0.0)


class Seen:
    """The gradient of a layer's weight that one step used: of all the backward passes of that step."""

    def __init__(self, module: Any, passes: Sequence[Pass], change: Change):
        self.module, self.passes, self.change = module, list(passes), change

    def rows(self, first: int, last: int) -> Tensor:
        """Return the gradient of some rows of the weight's matrix, (last - first, width)."""
        parts = (each.rows(self.module, first, last) for each in self.passes)
        total = next(parts)
        total = total.clone() if self.passes[0].dense is not None else total
        for part in parts:
            total = total.add_(part)
        return self.change(total)

    def at(self, start: Tensor, column: Tensor) -> Tensor:
        """Return the gradient of some entries, (entries,)."""
        parts = [each.at(self.module, start, column) for each in self.passes]
        return self.change(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0].clone())

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return how large inputs and outputs' gradients are, (width,) and (rows,), added up over the passes."""
        x_norms, dy_norms = zip(*(each.norms(self.module) for each in self.passes), strict=True)
        return torch.stack(x_norms).sum(0), torch.stack(dy_norms).sum(0)

    def dense(self) -> Tensor:
        """Return the gradient of the weight."""
        shape = self.module.entries.shape
        return self.rows(0, shape[0]).reshape(shape)


class Observed:
    """What is kept of a weight's dense gradients for growth: nothing, that of the last step, or a mean over steps.

    A backward pass hands over what the gradient follows from (`collect`), and says that the values' gradient has been
    accumulated (`commit`); a step takes the sum of its passes, changed as the gradient of the values was changed in
    between: scaled back, clipped (`take`). A pass whose gradients were cleared instead, or went elsewhere, does not
    count.

    Args:
        window: observed steps that a mean is taken of; 1 keeps the last step's gradient, as what it follows from.
        among: where a mean over steps is kept: None for all entries, as a dense tensor, or the number of inactive
            entries, those whose gradient is largest in the first observed step (candidates.py).
        observing: whether the next step is observed.
    """

    def __init__(self, window: int, observing: bool, among: int | None = None):
        self.window, self.among, self.observing = window, among, observing
        self.last: Seen | None = None  # of the last step, if the window is 1
        self.sum: Tensor | None = None  # dense, of all entries
        self.candidates: CandidateSet | None = None
        self.steps = 0  # that are observed
        self.shared = False  # whether all processes hold the same
        self.pending: list[Pass] = []  # since the values' gradient was cleared
        self.passing: list[Pass] = []  # of the backward pass that runs
        self.before: Before | None = None  # the values' gradient after the last of these passes
        self.task = -1  # the backward pass that `passing` is of

    def collect(self, part: Pass, accumulated: Tensor | None) -> None:
        """Add a part of the gradient of the backward pass that runs; `accumulated` is the values' gradient so far."""
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateImportUsage]
        if task != self.task:
            self.task, self.passing = task, []
            if accumulated is None or not accumulated.any():
                self.pending = []
        self.passing.append(part)

    def commit(self, gradient: Tensor | None) -> None:
        """Count what was collected in this pass: the values have received their gradient."""
        if self.passing:
            self.pending, self.passing = self.pending + self.passing, []
            self.before = None if gradient is None else Before.of(gradient.detach())

    def take(self, module: Any, scale: float = 1.0) -> Seen | None:
        """Return the gradient of a step, which takes the pending ones; None if none was observed.

        `scale` is what the optimizer multiplies gradients with.
        """
        pending, self.pending = self.pending, []
        if not pending or self.before is None or module.value.grad is None:
            return None
        change = change_between(self.before, module.value.grad)
        self.before = None
        return None if change is None else Seen(module, pending, Change(change.factor * scale, change.bound))

    @property
    def chooses(self) -> bool:
        """Whether the next observed step chooses the entries whose gradients are kept."""
        return self.observing and self.window > 1 and self.among is not None and self.candidates is None

    def count(self, seen: Seen | None) -> None:
        """Count a step with this gradient."""
        if seen is None:
            return
        self.shared = False
        if self.window == 1:
            self.last, self.steps = seen, 1
            return
        self.add(seen)
        self.steps += 1
        if self.steps > self.window:
            self.fade()

    def add(self, seen: Seen) -> None:
        """Add a step's gradient to the sum."""
        if self.among is None:
            gradient = seen.dense()
            self.sum = gradient if self.sum is None else self.sum.add_(gradient)
            return
        if self.candidates is not None:
            self.candidates.add(seen.at(self.candidates.start, self.candidates.column))
            return
        entries = seen.module.entries
        self.candidates = CandidateSet.choose(seen.rows, entries.start, entries.column, entries.width, self.among)

    def fade(self) -> None:
        """Let the earlier of more steps than the window count less, as they fade from a momentum."""
        for total in (self.sum, None if self.candidates is None else self.candidates.sum):
            if total is not None:
                total.mul_(self.window / self.steps)
        self.steps = self.window
        if self.candidates is not None:
            self.candidates.steps = self.window

    @property
    def known(self) -> bool:
        """Whether a step was observed since the last update."""
        return self.steps > 0

    def mean(self) -> Tensor | None:
        """Return the mean gradient of the observed steps, dense, or None if there were none."""
        if self.last is not None:
            return self.last.dense()
        return None if self.sum is None else self.sum / self.steps

    def mean_at(self, module: Any, position: Tensor) -> Tensor | None:
        """Return the mean gradient of some entries, at places in ascending order; zero where none was kept."""
        if self.last is not None:
            return self.last.at(*rows_of(position, module.entries.shape))
        if self.sum is not None:
            return self.sum.flatten()[position] / self.steps
        if self.candidates is None:
            return None
        places, mean = self.candidates.position(), self.candidates.mean()
        there = found(position, places)
        return torch.where(there >= 0, mean[there.clamp(min=0)], 0) if len(places) else mean.new_zeros(len(position))

    def forget(self) -> None:
        """Start anew after an update of the masks."""
        self.last = self.sum = self.candidates = None
        self.steps, self.shared = 0, False
        self.drop()

    def drop(self) -> None:
        """Forget the passes since the last step."""
        self.pending, self.passing, self.before = [], [], None


def change_between(before: Before, after: Tensor) -> Change | None:
    """Return how the gradient of the values was changed: from `before` to `after`, (nonzeros,).

    The change may be a factor (a loss scale, the clipping of a norm) or the clipping of each entry. Of any other the
    factor that comes closest is taken. None: the two are not finite, or have nothing in common.
    """
    now = Before.of(after)
    if not math.isfinite(now.largest):
        return None
    if torch.equal(before.some, now.some) and before.largest == now.largest:
        return Change()
    factor = (before.some.double() @ now.some.double()) / before.some.double().square().sum()
    if not factor.isfinite():
        return None if before.some.any() else Change()
    scaled = is_close(before.some * factor, now.some) and abs(factor) * before.largest <= now.largest * 1.0001
    if not scaled and is_close(before.some.clamp(-now.largest, now.largest), now.some):
        return Change(bound=now.largest)
    if abs(factor - 1) < 1e-5:
        return Change()
    return Change(factor.item()) if factor != 0 else None


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two vectors are equal up to rounding."""
    return bool((found - expected).norm() <= 1e-4 * expected.norm())
