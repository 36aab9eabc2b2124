"""Schedules as release 1.0 had them: objects with `step()` and `get_dr(prune_rate)`."""

from abc import abstractmethod
from typing import Any


class Counting:
    """`step` and `get_dr` of release 1.0, for code that steps a schedule itself. A Masking calls it with its steps."""

    _steps = 0

    def step(self) -> None:
        """Count a step."""
        object.__setattr__(self, "_steps", self._steps + 1)

    def get_dr(self, prune_rate: float | None = None) -> float:
        """Return the prune rate after the steps that `step` has counted."""
        return self(self._steps)

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the prune rate at a step."""


class Replayed:
    """A schedule of release 1.0, which can only go on to its next step, as a function of the step."""

    def __init__(self, decay: Any, prune_rate: float):
        self.decay, self.rates = decay, [prune_rate]

    def __call__(self, step: int) -> float:
        while len(self.rates) <= step:
            self.decay.step()
            self.rates.append(self.decay.get_dr(self.rates[-1]))
        return self.rates[step]
