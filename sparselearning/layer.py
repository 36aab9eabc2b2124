"""A weight with its mask and the statistics of its last update."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselearning.budgets import Budget
from sparselearning.compact import expanded, in_dense_form, is_compact
from sparselearning.orientation import PLAIN, Orientation
from sparselearning.patterns import Pattern, pattern_of, with_most, with_pattern, without_pattern
from sparselearning.processes.sharded import count_active, fetch, local_part, placed_like


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
    explored: int = 0  # weights that have been active at any time
    removed: int = 0  # weights pruned in the last update
    change: int = 0  # weights that the layer gains by the density in this update; loses, if negative
    importance: float = 0.0  # share of this layer in the importance of the network
    prune_rate: float = 0.0  # fraction of active weights to prune
    memory: dict[str, Tensor] = field(default_factory=dict)  # what functions keep from update to update, by name
    orientation: Orientation = PLAIN  # which dimensions of the weight are outputs
    version: int = -1  # torch's count of writes to `master` when it was masked last
    agreed: tuple[int, int] = (-1, -1)  # torch's counts of writes to the mask when all processes had the same
    trained: bool | None = None  # whether a step since the last update had a gradient; None: there was no step
    norm_dim: int | None = None  # each slice along it keeps a weight, for weight_norm; -1: the whole weight is one
    budget: Budget = field(default_factory=Budget)

    start_places: Tensor | None = None  # of the first active weights of a weight on the meta device, until it is held
    start_values: Any = None  # how its values are drawn (sparse/recorded.py)
    start_scale: float = 1.0  # what they are multiplied by

    compact = False  # whether no mask is kept, but the places of active weights (sparse/layer.py)

    @property
    def pattern(self) -> Pattern:
        """Which of the weights may be active together; the mask carries it, so that functions see it too."""
        return pattern_of(self.mask)

    @pattern.setter
    def pattern(self, pattern: Pattern) -> None:
        with_pattern(self.mask, pattern)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight and its mask."""
        return self.mask.shape

    @property
    def size(self) -> int:
        """Weights, active or not."""
        return self.mask.numel()

    @property
    def room(self) -> int:
        """Inactive weights that may become active."""
        return self.pattern.capacity(self.shape) - self.nonzeros

    @property
    def left_over(self) -> int:
        """Weights that could not be placed after neurons were removed; fewer than the remaining neurons."""
        return self.room if self.pattern.ablation else 0

    @property
    def zeros(self) -> int:
        """Inactive weights."""
        return self.size - self.nonzeros

    @property
    def density(self) -> float:
        """Fraction of weights that are active."""
        return self.nonzeros / self.size

    def take(self, mask: Tensor) -> None:
        """Take another mask."""
        self.mask.copy_(mask)

    def count_active(self) -> Tensor:
        """Return how many weights are active."""
        return count_active(self.mask) if self.start_places is None else torch.tensor(len(self.start_places))

    def count_explored(self) -> Tensor:
        """Return how many weights have been active at any time."""
        return count_active(self.ever_active) if self.start_places is None else self.count_active()

    def remember(self) -> None:
        """Note which weights have been active."""
        if self.start_places is None:
            self.ever_active.logical_or_(self.mask)

    def copy_of_mask(self) -> Any:
        """Return what `put_back` takes."""
        return self.mask.clone()

    def mask_of(self, before: Any) -> Tensor:
        """Return the mask that a copy is of."""
        return before

    def put_back(self, before: Any) -> None:
        """Take the mask back that there was before an update that failed."""
        self.mask.copy_(before)

    def unconnected(self) -> tuple[int, int]:
        """Return how many outputs have no inputs, and how many inputs no output reads."""
        way = self.orientation
        outputs, inputs, *_ = way.layer(self.shape)
        links = way.matrix(self.mask).reshape(way.copies, outputs, inputs, -1).any(3)
        return int((~links.any(2)).sum()), int((~links.any(1)).sum())

    def in_memory(self) -> tuple[Tensor, Tensor]:
        """Return the weights that there are, and which of them are active."""
        return self.master, self.mask

    @torch.no_grad()
    def set_weight(self, values: Tensor) -> None:
        """Write the weight that the optimizer steps, and its half-precision copy if there is one."""
        self.master.copy_(values)
        if self.weight is not self.master:
            self.weight.copy_(self.master)

    def agree(self) -> None:
        """Note that all processes have the same mask now, and that it is counted."""
        self.agreed = (self.mask._version, local_part(self.mask)._version)

    @property
    def edited(self) -> bool:
        """Whether somebody wrote into the mask since all processes had the same."""
        return self.agreed != (self.mask._version, local_part(self.mask)._version)

    def follow_weight(self) -> None:
        """Move the mask, and all else that belongs to the weight, to the weight's device."""
        device = self.weight.device
        if self.mask.device != device:
            edited = self.edited
            self.mask = with_pattern(self.mask.to(device), self.pattern)
            self.ever_active = self.ever_active.to(device)
            self.memory = {key: value.to(device) for key, value in self.memory.items()}
            if not edited:
                self.agree()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and copies of tensors: torch.distributed.checkpoint loads into what it is given."""
        return {"mask": without_pattern(self.mask).clone(), **self.numbers(), "ever_active": self.ever_active.clone()}

    def numbers(self) -> dict[str, Any]:
        """Return what is saved beside the mask."""
        return {
            "removed": self.removed,
            "importance": self.importance,
            "prune_rate": self.prune_rate,
            "memory": {key: value.clone() for key, value in self.memory.items()},
            "kept": len(self.memory),
            "most": self.pattern.most,
            "trained": self.trained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.pattern = with_most(self.pattern, state.get("most"))
        mask = expanded(state["mask"])
        self.mask.copy_(placed_like(self.mask, mask))
        self.ever_active.copy_(placed_like(self.mask, state.get("ever_active", mask)))
        self.take_numbers(state)
        if is_compact(state["mask"]):  # of a layer that held active weights alone, as did its memory
            self.memory = in_dense_form(self.memory, state["mask"])

    def take_numbers(self, state: dict[str, Any]) -> None:
        """Take what `numbers` returned."""
        self.removed, self.importance = state["removed"], state["importance"]
        self.prune_rate, self.trained = state["prune_rate"], state.get("trained")
        self.memory = {key: placed_like(self.weight, value) for key, value in state.get("memory", {}).items()}


def count(layers: Sequence[SparseLayer]) -> None:
    """Count the active weights of every layer."""
    for layer, number in zip(layers, fetch([layer.count_active() for layer in layers]), strict=True):
        layer.nonzeros = int(number)
