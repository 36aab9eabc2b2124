"""A method: the parts that it is made of, and the schedules and ways to hold weights that they name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparselearning.patterns import check_names
from sparselearning.schedules import (
    Constant,
    CosineDecay,
    CubicDensity,
    LinearDecay,
    Schedule,
    SigmoidDensity,
    StepDensity,
)
from sparselearning.sparse.training import SparseTraining
from sparselearning.start.masks import Density, SparseInit
from sparselearning.weights.dense_copy import DenseCopy
from sparselearning.weights.zeros import Zeros

# (prune rate at first, steps) -> prune rate at a step
DECAYS: Mapping[str, Callable[[float, int], Schedule]] = {
    "cosine": CosineDecay,
    "cosine_to_zero": partial(CosineDecay, eta_min=0.0),
    "linear": LinearDecay,
    "constant": lambda prune_rate, steps: Constant(prune_rate),
}
# (density at first, density at last, first step, last step) -> density at a step
DENSITY_SCHEDULES: Mapping[str, Any] = {
    "constant": None,
    "cubic": CubicDensity,
    "early_cubic": lambda start, end, begin, finish: CubicDensity(start, end, begin, begin + 3 * (finish - begin) // 4),
    "sigmoid": SigmoidDensity,
    "step": lambda start, end, begin, finish: StepDensity(start, end, finish),
    "soft": None,  # above the final density by what the next update prunes; see SoftDensity
}
# settings (regrown, reset_state, pull) -> what holds the weights
WEIGHTS: Mapping[str, Callable[..., Zeros]] = {
    "zero": Zeros,
    "kept": partial(DenseCopy, backward=2.0),
    "soft": partial(DenseCopy, soft=True),
    "sparse": SparseTraining,
}


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Fractions of training are of the number of optimizer steps, so that a method keeps its form in a run of any length.

    Raises:
        ValueError: for an unknown schedule or pattern, or a fraction that is none.
    """

    name: str  # as papers write it
    paper: str  # authors, year, link
    prune: str | Callable[..., Any] = "magnitude"
    redistribution: str | Callable[..., Any] = "none"
    growth: str | Callable[..., Any] = "random"
    sparse_init: SparseInit = "constant"
    prune_rate: float = 0.5  # fraction of active weights that the first update moves
    decay_schedule: str = "cosine"  # of the prune rate, until stop_fraction; a key of DECAYS
    prune_every_k_steps: int = 0  # steps between updates; 0: one at the end of every epoch
    start_fraction: float = 0.0  # of training, before which the masks stay
    stop_fraction: float = 1.0  # of training, after which the masks stay
    density_schedule: str = "constant"  # from start_fraction to stop_fraction; a key of DENSITY_SCHEDULES
    start_density: float | None = None  # None: the final density
    reset_state: bool | str = (
        False  # of the optimizer, where a weight becomes active: to zero (True), "mean", "restart"
    )
    regrown_warm_up: int = 0  # steps over which the learning rate of a weight that becomes active rises to its value
    lr_by_density: bool = False  # whether the learning rate of a layer is divided by the square root of its density
    regrown: str = "zero"  # what a weight is when it becomes active
    rescale: bool = False  # at the start, until layers have the norm they had without masks
    pull: float = 0.0  # of active weights towards zero, added to their gradients
    weights: str = "zero"  # how weights are held; a key of WEIGHTS
    pattern: str | Mapping[str, str] | None = "unstructured"  # which weights may be active together; see patterns.py

    def __post_init__(self):
        tables = [("decay_schedule", DECAYS), ("density_schedule", DENSITY_SCHEDULES), ("weights", WEIGHTS)]
        for part, known in tables:
            if getattr(self, part) not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"Unknown {part} {getattr(self, part)!r}. Choose one of {names}.")
        check_names("unstructured" if self.pattern is None else self.pattern)
        if not 0 <= self.start_fraction <= self.stop_fraction <= 1:
            raise ValueError(
                "Expected 0 <= start_fraction <= stop_fraction <= 1, "
                f"got {self.start_fraction} and {self.stop_fraction}."
            )
        if self.start_density is not None and not 0 < self.start_density <= 1:
            raise ValueError(f"Expected a start_density in (0, 1], got {self.start_density}.")
        if self.start_density is not None and self.density_schedule in ("constant", "soft"):
            raise ValueError(
                "A start_density needs a density_schedule that leaves it: 'cubic', 'early_cubic', 'sigmoid' or 'step'."
            )
        if self.density_schedule == "soft" and self.prune_rate >= 1:
            raise ValueError(f"density_schedule='soft' needs a prune_rate below 1, got {self.prune_rate}.")

    def density_at_start(self, density: Density) -> Density:
        """Return the density to begin with in order to end with `density`; {pattern: density} begins no sparser."""
        if isinstance(density, Mapping):
            return {pattern: max(self._start_of(end), end) for pattern, end in density.items()}
        return self._start_of(density)

    def _start_of(self, density: float) -> float:
        if self.density_schedule == "soft":
            return min(density / (1 - self.prune_rate), 1.0)
        return density if self.start_density is None else self.start_density
