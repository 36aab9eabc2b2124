"""Which layers keep a number of active weights together: all of a network, or those of one pattern of names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Budget:
    """How many weights some layers keep active together; weights move among these layers and no others."""

    pattern: str = "*"  # of names, in `add_module(density={pattern: ...})`
    nonzeros: int = 0  # active weights to keep
    prune_threshold: float = 0.001  # of prune_mode="threshold" and "adaptive_threshold"


def layers_of(budget: Budget, layers: Sequence[Any]) -> list[Any]:
    """Return those of the layers whose weights this budget counts."""
    return [layer for layer in layers if layer.budget is budget]


class Budgets:
    """The budgets of the layers of a network."""

    layers: list[Any]  # SparseLayer
    common: Budget  # of all layers whose density is a number

    @property
    def budgets(self) -> list[Budget]:
        """Those of the layers: one for all that have a number as density, one for each pattern of the others."""
        return list(dict.fromkeys(layer.budget for layer in self.layers)) or [self.common]

    @property
    def baseline_nonzero(self) -> int:
        """Active weights that the network keeps."""
        return sum(budget.nonzeros for budget in self.budgets)

    @baseline_nonzero.setter
    def baseline_nonzero(self, number: int) -> None:
        if len(self.budgets) > 1:
            raise AttributeError(f"There are {len(self.budgets)} budgets. Set masking.budgets[i].nonzeros of one.")
        self.budgets[0].nonzeros = number

    @property
    def prune_threshold(self) -> float:
        """The magnitude below which 'threshold' prunes; budgets move theirs apart, and one given here is for all."""
        return self.budgets[0].prune_threshold

    @prune_threshold.setter
    def prune_threshold(self, magnitude: float) -> None:
        for budget in self.budgets:
            budget.prune_threshold = magnitude

    @contextmanager
    def only(self, budget: Budget) -> Iterator[None]:
        """Hold the layers of one budget alone for a while, so that an update moves them as a network of their own."""
        layers = self.layers
        self.layers = layers_of(budget, layers)
        try:
            yield
        finally:
            self.layers = layers

    def _keep_counts(self):
        """Let each budget keep as many weights as are active now."""
        for budget in self.budgets:
            layers = layers_of(budget, self.layers)
            budget.nonzeros = sum(layer.nonzeros + layer.left_over for layer in layers)

    def _load_budgets(self, state):
        self.prune_threshold = state["prune_threshold"]
        if len(self.budgets) == 1:
            self.baseline_nonzero = state["baseline_nonzero"]
            return
        saved = state.get("budgets", [{}] * len(self.budgets))
        for budget, entry in zip(self.budgets, saved, strict=True):
            layers = layers_of(budget, self.layers)  # a file without budgets has their masks alone
            budget.nonzeros = entry.get("nonzeros", sum(layer.nonzeros + layer.left_over for layer in layers))
            budget.prune_threshold = entry.get("prune_threshold", budget.prune_threshold)
