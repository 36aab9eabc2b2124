"""Schedules: functions from the optimizer step to a prune rate in [0, 1], or to a density in (0, 1]."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CosineDecay:
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
class LinearDecay:
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
        if not 0 <= self.begin <= self.finish:
            raise ValueError(f"Expected steps 0 <= begin <= finish, got begin={self.begin} and finish={self.finish}.")

    def __call__(self, step: int) -> float:
        if step >= self.finish:
            return self.end
        if step <= self.begin:
            return self.start
        progress = (step - self.begin) / (self.finish - self.begin)
        return self.end + (self.start - self.end) * (1 - progress) ** 3


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
    decay: Callable[[int], float]
    finish: int

    def __post_init__(self):
        _check_density(density=self.density)
        if not self.decay(0) < 1:
            raise ValueError(f"Expected a prune rate below 1, which leaves weights; got {self.decay(0)} at step 0.")

    def __call__(self, step: int) -> float:
        if step >= self.finish:
            return self.density
        return min(self.density / (1 - self.decay(step)), 1.0)


def _check_density(**densities):
    for name, density in densities.items():
        if not 0 < density <= 1:
            raise ValueError(f"Expected the density {name} in (0, 1], got {density}.")


def _check(prune_rate, T_max):
    if not 0 <= prune_rate <= 1:
        raise ValueError(f"Expected a prune rate in [0, 1], got {prune_rate}.")
    if T_max < 1:
        raise ValueError(f"Expected T_max of at least 1 step, got {T_max}.")
