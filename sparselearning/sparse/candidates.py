"""Candidates for growth by momentum: inactive entries whose gradients are summed over several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparselearning.compact import positions
from sparselearning.loading import MOST_STEPS, check_entries, check_tensor, check_whole, describe, refuse
from sparselearning.sparse.growing import best_of, highest_inactive, indices_at


class CandidateSet:
    """The sum of the gradients of some inactive entries of a weight over `steps` steps.

    `start` (rows + 1,) and `column` (candidates,), int32, say which entries they are, as those of a weight do; a row of
    it has `width` entries. `sum` is (candidates,).
    """

    def __init__(self, start: Tensor, column: Tensor, width: int, total: Tensor, steps: int):
        self.start, self.column, self.width = start, column, width
        self.sum, self.steps = total, steps

    @classmethod
    def choose(
        cls, gradient_rows: Callable[[int, int], Tensor], start: Tensor, column: Tensor, width: int, number: int
    ) -> CandidateSet:
        """Return the `number` inactive entries whose |gradient| is highest in a step, which counts as the first.

        `start` and `column` are the weight's; see `highest_inactive`.
        """
        position, gradient = highest_inactive(gradient_rows, start, column, width, number)
        return cls(*indices_at(position, len(start) - 1, width), width, gradient.clone(), 1)

    def position(self) -> Tensor:
        """Return the positions of the candidates, ascending."""
        return positions(self.start, self.column, self.width)

    def add(self, gradient: Tensor) -> None:
        """Count another step, in which the candidates have these gradients (candidates,)."""
        self.sum += gradient
        self.steps += 1

    def mean(self) -> Tensor:
        """Return the mean gradient of each candidate over the steps."""
        return self.sum / self.steps

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """Return positions (ascending) and mean gradients of the k candidates whose |mean gradient| is highest."""
        return best_of(self.position(), self.mean(), k)

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved between two steps."""
        return {"start": self.start, "column": self.column, "sum": self.sum, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned, of a weight of the same shape.

        Raises:
            RuntimeError: if it is none; nothing is taken.
        """
        check_candidates("'candidates'", state, len(self.start) - 1, self.width)
        device = self.start.device
        self.start, self.column = (state[name].to(device, copy=True) for name in ("start", "column"))
        self.sum, self.steps = state["sum"].to(device, copy=True), state["steps"]


def check_candidates(entry: str, state: Any, rows: int, width: int) -> None:
    """Check a saved state of the candidates of a weight whose `rows` rows have `width` entries.

    Raises:
        RuntimeError: if it is none.
    """
    check_entries(entry, state, ("start", "column", "sum", "steps"))
    start, column = state["start"], state["column"]
    check_tensor(f"{entry}['start']", start, (rows + 1,), torch.int32)
    check_tensor(f"{entry}['column']", column, dtype=torch.int32)
    if column.dim() != 1:
        refuse(f"{entry}['column']", "one dimension", describe(column))
    check_tensor(f"{entry}['sum']", state["sum"], column.shape, "floating")
    check_whole(f"{entry}['steps']", state["steps"], 1, MOST_STEPS)
    counts = start.long().diff()
    if int(start[0]) != 0 or int(start[-1]) != len(column) or bool((counts < 0).any()):
        refuse(f"{entry}['start']", f"numbers that rise from 0 to {len(column)}", "others")
    if bool(((column < 0) | (column >= width)).any()) or bool((positions(start, column, width).diff() <= 0).any()):
        refuse(f"{entry}['column']", f"numbers below {width} that rise within a row", "others")
