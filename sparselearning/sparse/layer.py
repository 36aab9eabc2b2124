"""A sparse layer whose mask is the places of its active values: no mask is kept, and none is needed in an update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparselearning.compact import compact, found, is_compact, position_of
from sparselearning.layer import SparseLayer
from sparselearning.orientation import PLAIN
from sparselearning.patterns import Pattern, with_most, with_pattern
from sparselearning.processes.agreement import checksum_of
from sparselearning.sparse.entries import Entries
from sparselearning.sparse.explored import Explored
from sparselearning.sparse.held import Held
from sparselearning.sparse.merging import Merged
from sparselearning.sparse.on_demand import on_demand

COMPUTED = ("mask", "ever_active", "weight", "master", "version", "start_places", "start_values", "start_scale")


class CompactLayer(SparseLayer):
    """A layer that holds the places of its active weights.

    `mask` is computed when somebody asks, and takes as much memory and time as the layer has weights; what is written
    into it counts. While a function marked `entrywise` looks at the layer (`in_rows`), mask, weight and master are
    those of the active entries, in a row: (nonzeros,).

    In an update the entries stay where they are until `settle`: `kept` says which of them stay, and `grown` holds the
    places (int64, ascending) that come.
    """

    module: Held
    compact = True

    @classmethod
    def of(cls, layer: SparseLayer, module: Held) -> CompactLayer:
        """Return the layer that holds what `module` trains, in place of one with a mask."""
        new = cls.__new__(cls)
        kept = {name: value for name, value in vars(layer).items() if name not in COMPUTED}
        vars(new).update(kept, module=module, plain_pattern=layer.pattern, looks=None, writes=0, agreed_writes=0)
        new.explored_places = Explored()
        new.stay()
        new.remember()
        return new

    def __repr__(self) -> str:
        return f"CompactLayer({self.name!r}, shape={tuple(self.shape)}, nonzeros={self.nonzeros})"

    @property
    def entries(self) -> Entries:
        return self.module.entries

    @property
    def shape(self) -> torch.Size:
        return self.entries.shape

    @property
    def size(self) -> int:
        return self.entries.shape.numel()

    @property
    def pattern(self) -> Pattern:
        return self.plain_pattern

    @pattern.setter
    def pattern(self, pattern: Pattern) -> None:
        self.plain_pattern = pattern

    # What functions see

    @property
    def mask(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.looks is not None:
            return torch.ones_like(self.looks, dtype=torch.bool) if self.kept is None else self.kept.clone()
        mask = self.entries.mask()
        flat = mask.view(-1)
        if self.kept is not None:
            flat[self.entries.position[~self.kept]] = False
        if self.grown is not None:
            flat[self.grown] = True
        return with_pattern(on_demand(mask, self.take), self.pattern)

    @property
    def ever_active(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AttributeError(
            f"Which weights of {self.name} have been active is not kept with weights='sparse', only how many: "
            "masking.exploration_rate. Use weights='zero' to read it."
        )

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.module.dense if self.looks is None else self.looks

    @property
    def master(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weight

    @contextmanager
    def in_rows(self) -> Iterator[None]:
        """Let mask and weight be those of the active entries for a while."""
        self.looks = self.entries.value.detach()
        try:
            yield
        finally:
            self.looks = None

    # An update

    def stay(self) -> None:
        """Forget what is to move."""
        self.kept: Tensor | None = None
        self.grown: Tensor | None = None

    def take(self, mask: Tensor) -> None:
        """Take a mask, (nonzeros,) while functions look at the active entries, and else of the weight's shape."""
        self.writes += 1
        if self.looks is not None:
            self.kept = mask if self.kept is None else mask & self.kept
            return
        flat, position = mask.flatten(), self.entries.position
        self.kept = flat[position]
        grown = flat.index_fill(0, position, False).nonzero().flatten()
        self.grown = grown if len(grown) else None

    def grow(self, position: Tensor) -> None:
        """Let inactive weights come, at places in ascending order; what has just left may come again."""
        self.writes += 1
        self.grown = position

    @property
    def moves(self) -> bool:
        """Whether entries leave or come."""
        return self.grown is not None or (self.kept is not None and not bool(self.kept.all()))

    def places(self) -> Tensor:
        """Return where the active weights are, with what leaves and comes: int64, ascending."""
        position = self.entries.position
        if self.kept is not None:
            position = position[self.kept]
        return position if self.grown is None else torch.cat([position, self.grown]).sort().values

    def settle(self) -> Merged:
        """Move the entries."""
        kept, grown = self.kept, self.grown
        self.stay()
        return self.entries.move(kept, torch.empty(0, dtype=torch.int64) if grown is None else grown)

    def copy_of_mask(self) -> Any:
        return self.kept, self.grown

    def mask_of(self, before: Any) -> Tensor:
        return self.entries.mask()

    def put_back(self, before: Any) -> None:
        self.kept, self.grown = before

    def count_active(self) -> Tensor:
        kept = len(self.entries.value) if self.kept is None else int(self.kept.sum())
        return torch.tensor(kept + (0 if self.grown is None else len(self.grown)))

    def count_explored(self) -> Tensor:
        return torch.tensor(self.explored_places.count)

    def remember(self) -> None:
        known = self.explored_places.count > 0
        self.explored_places.add(self.grown if known and self.grown is not None else self.places())

    def checksum(self) -> Tensor:
        """Return the number that `agreement.checksum` returns for the mask."""
        return checksum_of(self.places(), self.size)

    def agree(self) -> None:
        self.agreed_writes = self.writes

    @property
    def edited(self) -> bool:
        return self.agreed_writes != self.writes

    def unconnected(self) -> tuple[int, int]:
        if self.orientation != PLAIN or self.grown is not None or self.kept is not None:
            return super().unconnected()
        entries, inputs = self.entries, self.shape[1]
        read = (entries.column // max(entries.width // max(inputs, 1), 1)).unique()
        return int((entries.start.diff() == 0).sum()), inputs - len(read)

    def in_memory(self) -> tuple[Tensor, Tensor]:
        value, beyond = self.entries.value.detach(), self.entries.beyond
        others = value.new_zeros(0) if beyond is None else beyond[1]
        active = torch.arange(len(value) + len(others), device=value.device) < len(value)
        return torch.cat([value, others]), active

    def follow_weight(self) -> None:
        device = self.entries.value.device
        self.memory = {key: value.to(device) for key, value in self.memory.items()}

    def set_weight(self, values: Tensor) -> None:
        self.entries.write(values)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        mask = compact(self.places(), self.shape)
        return {"mask": mask, **self.numbers(), "explored": self.explored_places.hashes.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pattern = with_most(self.pattern, state.get("most"))
        mask = state["mask"]
        position = position_of(mask) if is_compact(mask) else mask.flatten().nonzero().flatten()
        own = self.entries.position
        self.kept = found(own, position) >= 0
        grown = position[found(position, own) < 0]
        self.grown = grown if len(grown) else None
        self.explored_places = Explored(state["explored"].clone() if "explored" in state else None)
        if "ever_active" in state:
            self.explored_places.add(state["ever_active"].flatten().nonzero().flatten())
        self.explored_places.add(position)
        self.take_numbers(state)
