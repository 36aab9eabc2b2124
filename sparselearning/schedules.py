"""When masks move, and schedules: functions from the step to a prune rate in [0, 1] or a density in (0, 1]."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex

from sparselearning.stepped import Counting, Replayed

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Updates:
    """When the masks move, and to which density.

    >>> updates = Updates(every=100, last=250)
    >>> [step for step in range(1, 1000) if updates.after_step(step)]
    [100, 200, 250]

    Args:
        every: optimizer steps between two updates; 0 for one at the end of every epoch.
        first: step before which the masks stay.
        last: step after which the masks stay; None: none. At `last` itself there is always an update, so that a density
            schedule arrives; if there is no `last` and `every` is not 0, at the step where the schedule ends.
        density: function from the step to the density that an update leaves, in (0, 1]; or {pattern: function}, for the
            patterns of `add_module(density={pattern: ...})`; None keeps it.

    Raises:
        ValueError: for steps that are negative or not whole numbers.
        TypeError: for a density that is no function of the step.
    """

    every: int = 0
    first: int = 0
    last: int | None = None
    density: Schedule | Mapping[str, Schedule] | None = None

    def __post_init__(self):
        for name, steps in [("every", self.every), ("first", self.first), ("last", self.last or 0)]:
            if not isinstance(steps, SupportsIndex) or steps.__index__() < 0:
                raise ValueError(f"Expected {name} to be a number of steps, 0 or more, got {steps!r}.")
        for density in self.density.values() if isinstance(self.density, Mapping) else [self.density]:
            if density is not None and not callable(density):
                raise TypeError(
                    "Expected density to be a function of the step, such as CubicDensity(1.0, 0.1, begin=0, "
                    f"finish=1000), got {density!r}. A density that stays is the one given to add_module."
                )

    def after_step(self, step: int) -> bool:
        """Tell whether the masks move after this step."""
        return step in self._always or (self.every > 0 and step % self.every == 0 and self._is_open(step))

    def after_epoch(self, step: int) -> bool:
        """Tell whether the masks move at the end of an epoch that ends with this step."""
        return not self.every and self._is_open(step)

    @cached_property
    def _always(self) -> tuple[int, ...]:
        """The step that has an update whatever `every` is; none, if no step has."""
        end = self.last if self.last is not None or not self.every else self.ends_at()
        return () if end is None or (self.last is None and end < self.first) else (end,)

    def _is_open(self, step: int) -> bool:
        return self.first <= step and (self.last is None or step < self.last)

    def ahead(self, step: int) -> tuple[float, bool]:
        """Return the steps until the next update that a step triggers (inf if none), and whether steps trigger all.

        >>> updates = Updates(every=100, first=150, last=250)
        >>> updates.ahead(10), updates.ahead(200), updates.ahead(250)
        ((190, True), (50, True), (inf, True))
        """
        left = [math.inf]
        if self.every:
            coming = (max(step + 1, self.first) + self.every - 1) // self.every * self.every
            left += [coming - step] if self._is_open(coming) else []
        for end in self._always:
            if step < end:
                left += [end - step]
        return min(left), self.every > 0 or (self.last is not None and step >= self.last)

    def ends_at(self) -> int | None:
        """Return the step at which the density schedule ends; None if it does not say, or there is none.

        >>> Updates(density=CubicDensity(1.0, 0.1, begin=0, finish=100)).ends_at()
        100
        """
        if self.density is None or self.last is not None:
            return None if self.density is None else self.last
        all_of_them = self.density.values() if isinstance(self.density, Mapping) else [self.density]
        ends = [getattr(schedule, "finish", getattr(schedule, "at", math.inf)) for schedule in all_of_them]
        last = max(ends, default=math.inf)
        return int(last) if last < math.inf else None

    def density_at(self, step: int) -> float | dict[str, float] | None:
        """Return the density that an update after this step leaves, or {pattern: density}; None if it stays as it is.

        Raises:
            ValueError: if the schedule gives a number outside (0, 1].
        """
        if isinstance(self.density, Mapping):
            return {pattern: _density_at(schedule, step) for pattern, schedule in self.density.items()}
        return None if self.density is None else _density_at(self.density, step)


def _density_at(schedule, step):
    if not 0 < (density := schedule(step)) <= 1:
        raise ValueError(f"Expected a density in (0, 1] at step {step}, got {density} of the density schedule.")
    return density


def decay_of(prune_rate_decay: Schedule | Any | None, prune_rate: float) -> Schedule:
    """Return the schedule of the prune rate: `prune_rate_decay`, or the constant `prune_rate` where it is None.

    An object of release 1.0 has methods `step()` and `get_dr(prune_rate)` of its own, which are called in turn.

    Raises:
        TypeError: if it is no function of the step.
    """
    if getattr(type(prune_rate_decay), "get_dr", Counting.get_dr) is not Counting.get_dr:
        return Replayed(prune_rate_decay, prune_rate)
    if prune_rate_decay is not None and not callable(prune_rate_decay):
        raise TypeError(
            "Expected prune_rate_decay to be a function of the step, such as CosineDecay(0.5, T_max=1000), "
            f"got {prune_rate_decay!r}. A constant rate is prune_rate_decay=None and prune_rate=0.5."
        )
    decay: Any = prune_rate_decay
    return Constant(prune_rate) if decay is None else decay


@dataclass(frozen=True)
class CosineDecay(Counting):
    """Anneal from `prune_rate` at step 0 to `eta_min` at step `T_max` along half a cosine, and stay there.

    A `prune_rate` below `eta_min` stays as it is: the rate never rises.

    >>> decay = CosineDecay(0.5, T_max=100)
    >>> decay(0), decay(100), decay(150)
    (0.5, 0.005, 0.005)
    """

    prune_rate: float
    T_max: int
    eta_min: float = 0.005

    def __post_init__(self):
        _check(self.prune_rate, self.T_max)
        if not 0 <= self.eta_min <= 1:
            raise ValueError(f"Expected eta_min in [0, 1], got {self.eta_min}.")

    def __call__(self, step: int) -> float:
        progress = min(step / self.T_max, 1)
        end = min(self.eta_min, self.prune_rate)
        return end + (self.prune_rate - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class LinearDecay(Counting):
    """Anneal from `prune_rate` at step 0 to zero at step `T_max` along a line, and stay there.

    >>> decay = LinearDecay(0.5, T_max=100)
    >>> decay(0), decay(50), decay(150)
    (0.5, 0.25, 0.0)
    """

    prune_rate: float
    T_max: int

    def __post_init__(self):
        _check(self.prune_rate, self.T_max)

    def __call__(self, step: int) -> float:
        return self.prune_rate * max(1 - step / self.T_max, 0)


@dataclass(frozen=True)
class Constant:
    """The same `prune_rate` at every step."""

    prune_rate: float

    def __post_init__(self):
        _check(self.prune_rate, 1)

    def __call__(self, step: int) -> float:
        return self.prune_rate


@dataclass(frozen=True)
class CubicDensity:
    """Move from the density `start` at step `begin` to `end` at step `finish`, fast at first, and stay there.

    Zhu & Gupta 2017, To prune, or not to prune, https://arxiv.org/abs/1710.01878, equation 1, for densities.

    >>> density = CubicDensity(start=1.0, end=0.1, begin=0, finish=100)
    >>> density(0), round(density(50), 4), density(100), density(150)
    (1.0, 0.2125, 0.1, 0.1)
    """

    start: float
    end: float
    begin: int
    finish: int

    def __post_init__(self):
        _check_density(start=self.start, end=self.end)
        _check_steps(self.begin, self.finish)

    def __call__(self, step: int) -> float:
        if step >= self.finish:
            return self.end
        if step <= self.begin:
            return self.start
        progress = (step - self.begin) / (self.finish - self.begin)
        return self.end + (self.start - self.end) * (1 - progress) ** 3


@dataclass(frozen=True)
class SigmoidDensity:
    """Move from the density `start` at step `begin` to `end` at step `finish`, slowly at both ends, and stay there.

    Zhang et al. 2025 (CHTss), https://arxiv.org/abs/2501.19107, section 3.3, with k = 6: 1 / (1 + exp(-k x)) of x from
    -1 to 1, stretched so that it begins at `start` and arrives at `end`, as in the authors' code.

    >>> density = SigmoidDensity(start=0.5, end=0.1, begin=0, finish=100)
    >>> density(0), round(density(25), 4), round(density(50), 4), density(100), density(150)
    (0.5, 0.4819, 0.3, 0.1, 0.1)
    """

    start: float
    end: float
    begin: int
    finish: int
    k: float = 6.0

    def __post_init__(self):
        _check_density(start=self.start, end=self.end)
        _check_steps(self.begin, self.finish)
        if not 0 < self.k < 700:
            raise ValueError(f"Expected a positive k below 700, got {self.k}.")

    def __call__(self, step: int) -> float:
        if step >= self.finish:
            return self.end
        if step <= self.begin:
            return self.start
        x = 2 * (step - self.begin) / (self.finish - self.begin) - 1
        share = 0.5 + math.tanh(self.k * x / 2) / math.tanh(self.k / 2) / 2  # the sigmoid is (1 + tanh(k x / 2)) / 2
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class StepDensity:
    """The density `start` before step `at`, `end` from then on.

    >>> density = StepDensity(start=1.0, end=0.1, at=100)
    >>> density(99), density(100)
    (1.0, 0.1)
    """

    start: float
    end: float
    at: int

    def __post_init__(self):
        _check_density(start=self.start, end=self.end)

    def __call__(self, step: int) -> float:
        return self.end if step >= self.at else self.start


@dataclass(frozen=True)
class SoftDensity:
    """Above `density` by what the next update prunes, at the prune rate of `decay`; `density` from step `finish` on.

    Yuan et al. 2021, MEST, https://arxiv.org/abs/2110.14032: the soft memory bound. n / (1 - rate) weights are active
    after an update, and n when the next one has pruned.

    >>> density = SoftDensity(0.06, Constant(0.4), finish=100)
    >>> round(density(0), 4), density(100)
    (0.1, 0.06)
    """

    density: float
    decay: Schedule
    finish: int

    def __post_init__(self):
        _check_density(density=self.density)
        if not self.decay(0) < 1:
            raise ValueError(f"Expected a prune rate below 1, which leaves weights; got {self.decay(0)} at step 0.")

    def __call__(self, step: int) -> float:
        if step >= self.finish:
            return self.density
        return min(self.density / (1 - self.decay(step)), 1.0)


def _check_steps(begin, finish):
    if not 0 <= begin <= finish:
        raise ValueError(f"Expected steps 0 <= begin <= finish, got begin={begin} and finish={finish}.")


def _check_density(**densities):
    for name, density in densities.items():
        if not 0 < density <= 1:
            raise ValueError(f"Expected the density {name} in (0, 1], got {density}.")


def _check(prune_rate, T_max):
    if not 0 <= prune_rate <= 1:
        raise ValueError(f"Expected a prune rate in [0, 1], got {prune_rate}.")
    if T_max < 1:
        raise ValueError(f"Expected T_max of at least 1 step, got {T_max}.")
