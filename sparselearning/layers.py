"""One sparse weight: the parameter, its mask and what is known about them."""

from dataclasses import dataclass, field

from torch import Tensor

from sparselearning.patterns import Pattern, pattern_of


@dataclass(eq=False)
class SparseLayer:
    """A weight, its mask (bool, True = active), and the statistics of its last update.

    `master` is the tensor the optimizer steps: the weight itself, or its fp32 copy in mixed precision.
    """

    name: str
    weight: Tensor
    master: Tensor
    mask: Tensor
    ever_active: Tensor  # bool: active now, or before
    nonzeros: int = 0  # active weights
    removed: int = 0  # weights pruned in the last update
    importance: float = 0.0  # share of this layer in the importance of the network
    prune_rate: float = 0.0  # fraction of active weights to prune
    memory: dict[str, Tensor] = field(default_factory=dict)  # what functions keep from update to update, by name

    @property
    def pattern(self) -> Pattern:
        """Which of the weights may be active together."""
        return pattern_of(self.mask)

    @property
    def room(self) -> int:
        """Inactive weights that may become active."""
        return self.pattern.capacity(self.mask.shape) - self.nonzeros

    @property
    def left_over(self) -> int:
        """Weights that found no place when neurons were given up, fewer than the neurons that are left."""
        return self.room if self.pattern.ablation else 0

    @property
    def zeros(self) -> int:
        """Inactive weights."""
        return self.mask.numel() - self.nonzeros

    @property
    def density(self) -> float:
        """Fraction of weights that are active."""
        return self.nonzeros / self.mask.numel()
