"""Names of release 1.0 that code written for it reads of a Masking and of schedules; docs/migration.md has them all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparselearning import reports
from sparselearning.schedules import Updates


class OldNames:
    """What functions of release 1.0 read of a Masking, besides the names that have stayed."""

    layers: list[Any]  # SparseLayer
    updates: Updates
    prune: Callable[..., Any]
    grow: Callable[..., Any]
    measure: Callable[..., Any]

    tolerance = 0.02  # of prune_mode="threshold", and of a user's search
    growth_threshold = 0.001  # that of a user's search; no built-in function searches one
    growth_increment = increment = 0.2

    @property
    def prune_every_k_steps(self) -> int:
        """Optimizer steps between two updates; 0 for one at the end of every epoch."""
        return self.updates.every

    @prune_every_k_steps.setter
    def prune_every_k_steps(self, steps: int) -> None:
        self.updates = replace(self.updates, every=steps or 0)

    @property
    def names(self) -> list[str]:
        """Names of the masked weights."""
        return [layer.name for layer in self.layers]

    @property
    def prune_func(self) -> Callable[..., Any]:
        """The function that prunes."""
        return self.prune

    @property
    def growth_func(self) -> Callable[..., Any]:
        """The function that grows."""
        return self.grow

    @property
    def redistribution_func(self) -> Callable[..., Any]:
        """The function that measures the importance of a layer."""
        return self.measure

    @property
    def name_to_32bit(self) -> dict[str, Tensor]:
        """The fp32 copies that the optimizer steps, of weights in half precision."""
        return {layer.name: layer.master for layer in self.layers if layer.master is not layer.weight}

    @property
    def half(self) -> bool:
        """Whether there are such copies."""
        return bool(self.name_to_32bit)

    def print_nonzero_counts(self) -> None:
        """Print the active weights of every layer and of the network; `summary` says more, and `verbose` logs them."""
        print("\n".join(reports.lines_of_counts(self)))
