"""The sparse layers of a network: each weight with its mask and counts, and views, removal and saving of them all."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sparselearning import loading
from sparselearning.budgets import Budget, Budgets, layers_of
from sparselearning.compact import expanded
from sparselearning.orientation import PLAIN, Orientation
from sparselearning.patterns import Pattern, pattern_of, with_most, with_pattern, without_pattern
from sparselearning.processes import agreement, distributed
from sparselearning.processes.group import Group, current
from sparselearning.processes.sharded import count_active, fetch, local_part, placed_like
from sparselearning.start.maskable import canonical_name
from sparselearning.start.names import plain_name

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        return self.pattern.capacity(self.mask.shape) - self.nonzeros

    @property
    def left_over(self) -> int:
        """Weights that could not be placed after neurons were removed; fewer than the remaining neurons."""
        return self.room if self.pattern.ablation else 0

    @property
    def zeros(self) -> int:
        """Inactive weights."""
        return self.mask.numel() - self.nonzeros

    @property
    def density(self) -> float:
        """Fraction of weights that are active."""
        return self.nonzeros / self.mask.numel()

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

    @property
    def written(self) -> bool:
        """Whether somebody wrote into the weight since it was masked."""
        return self.version != self.master._version

    def note_written(self) -> None:
        """Note that the weight is masked as it is."""
        self.version = self.master._version

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

    def take_numbers(self, state: dict[str, Any]) -> None:
        """Take what `numbers` returned."""
        self.removed, self.importance = state["removed"], state["importance"]
        self.prune_rate, self.trained = state["prune_rate"], state.get("trained")
        self.memory = {key: placed_like(self.weight, value) for key, value in state.get("memory", {}).items()}


def count(layers: Sequence[SparseLayer]) -> None:
    """Count the active weights of every layer."""
    for layer, number in zip(layers, fetch([layer.count_active() for layer in layers]), strict=True):
        layer.nonzeros = int(number)


class ByName(Generic[T]):
    """A view of all layers: layer name -> one of the layer's fields."""

    def __init__(self, field: str):
        self.field = field

    def __get__(self, layers: Any, owner: type | None = None) -> dict[str, T]:
        return {layer.name: getattr(layer, self.field) for layer in layers.layers}


class InTotal:
    """A view of all layers: the sum of a count."""

    def __init__(self, field: str):
        self.field = field

    def __get__(self, layers: Any, owner: type | None = None) -> int:
        return sum(getattr(layer, self.field) for layer in layers.layers)


class Layers(Budgets):
    """The layers that hold masks, and the names under which functions, users and release 1.0 read them."""

    masks = ByName[Tensor]("mask")
    densities = ByName[float]("density")
    orientations = ByName[Orientation]("orientation")
    memory = ByName[dict[str, Tensor]]("memory")  # what functions keep from update to update; saved with the masks
    ever_active = ByName[Tensor]("ever_active")  # bool: active now, or before
    name2nonzeros = ByName[int]("nonzeros")
    name2zeros = ByName[int]("zeros")
    name2removed = ByName[int]("removed")  # in the last update, as the next two
    name2variance = ByName[float]("importance")  # share in the importance of the network
    name2prune_rate = ByName[float]("prune_rate")
    total_nonzero, total_zero, total_removed = InTotal("nonzeros"), InTotal("zeros"), InTotal("removed")

    def __init__(self):
        self.modules: list[nn.Module] = []
        self.layers: list[SparseLayer] = []
        self.kept_dense: dict[str, tuple[Tensor, str]] = {}  # name -> parameter without a mask, and why it has none
        self.common = Budget()  # of all layers whose density is a number
        self.group: Group | None = None  # the processes that share the masks; None: not known yet, or one alone
        self.disagreement = ""  # what differed when processes compared their masks last

    @property
    def density(self) -> float:
        """Fraction of the masked weights that are active."""
        return self.total_nonzero / max(self.total_nonzero + self.total_zero, 1)

    @property
    def exploration_rate(self) -> float:
        """Fraction of the masked weights that have been active at any time.

        R_s of Liu et al. 2021, Do We Actually Need Dense Over-Parameterization?, https://arxiv.org/abs/2102.02887.
        """
        return sum(layer.explored for layer in self.layers) / max(self.total_nonzero + self.total_zero, 1)

    def remove_weight(self, name: str) -> None:
        """Train the weight (or the layer) of this exact name densely from now on; its pruned entries start at zero.

        To keep a layer's initial values, name it in `add_module(dense=[...])` instead.

        Raises:
            KeyError: if no masked weight has this name.
        """
        for text in (name, canonical_name(name)):  # the second of a name under a wrapper
            names = {text, f"{text}.weight"}
            if found := [x for x in self.layers if x.name in names or plain_name(x.name) in names]:
                return self._remove(found)
        raise KeyError(f"No masked weight is called {name!r}. There are {', '.join(self.masks)}.")

    def remove_weight_partial_name(self, partial_name: str) -> None:
        """Train the weights whose name contains `partial_name` densely from now on."""
        self._remove([layer for layer in self.layers if partial_name in layer.name])

    def remove_type(self, nn_type: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
        """Train the weights held directly by modules of this type densely from now on."""
        modules = [module for root in self.modules for module in root.modules() if isinstance(module, nn_type)]
        owned = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
        self._remove([layer for layer in self.layers if id(layer.weight) in owned])

    def _remove(self, removed):
        self.layers = [layer for layer in self.layers if layer not in removed]
        for budget in {layer.budget for layer in removed}:
            kept = budget.nonzeros - sum(layer.nonzeros + layer.left_over for layer in layers_of(budget, removed))
            # The masks may hold more or fewer than are to be kept, by what a user's function grew or pruned.
            budget.nonzeros = min(max(kept, 0), sum(layer.size for layer in layers_of(budget, self.layers)))
        for layer in removed:
            self.kept_dense[layer.name] = (layer.weight, "its mask was removed")
            logger.info("%s stays dense: %d weights.", layer.name, layer.size)

    def _take(self, module, layers, kept_dense):
        """Hold the masks of layers of a module; `kept_dense` are its other parameters, with the reason."""
        self.modules.append(module)
        self.layers += layers
        self._keep_dense(kept_dense)
        self._agree_and_count()
        self._compare_masks("add_module")
        self._keep_counts()

    def _keep_dense(self, parameters):
        """Note (parameter, reason) by name; each parameter once, and none that is masked by now."""
        masked = {id(layer.weight) for layer in self.layers}
        kept = {name: entry for name, entry in self.kept_dense.items() if id(entry[0]) not in masked}
        known = {id(parameter) for parameter, _ in kept.values()}
        for name, entry in parameters.items():
            while name in kept and id(entry[0]) not in known:  # a second module may use the names of the first
                name = f"{len(self.modules) - 1}.{name}"
            if id(entry[0]) not in known:
                kept[name] = entry
        self.kept_dense = kept

    def _agree_and_count(self):
        """Give all processes the masks of the first, and count."""
        distributed.broadcast_masks(layer.mask for layer in self.layers if not (layer.compact or layer.mask.is_meta))
        for layer in self.layers:
            layer.remember()
        self._count()

    def _count(self):
        numbers = [layer.count_active() for layer in self.layers] + [layer.count_explored() for layer in self.layers]
        counts, own = [int(number) for number in fetch(numbers)], len(self.layers)
        for layer, nonzeros, explored in zip(self.layers, counts[:own], counts[own:], strict=True):
            layer.nonzeros, layer.explored = nonzeros, explored
            layer.agree()

    def _compare_masks(self, place):
        self.disagreement = ""
        try:
            agreement.check_agreement(self.layers, place)
        except agreement.ProcessError as error:
            self.disagreement = str(error)
            raise

    def _follow_weights(self):
        for layer in self.layers:
            layer.follow_weight()

    def state_dict(self) -> dict[str, Any]:
        """Return masks and counts; plain numbers and tensors."""
        layers = {layer.name: layer.state_dict() for layer in self.layers}
        state = {"baseline_nonzero": self.baseline_nonzero, "layers": layers}
        return state | ({"budgets": [asdict(budget) for budget in self.budgets]} if len(self.budgets) > 1 else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned.

        Raises:
            RuntimeError: if the masked weights differ in name or shape, or an entry is none that `state_dict` returns;
                nothing is changed then.
        """
        self._check_state(state)
        current().meet("load_state_dict")  # if it does not fit on one process, nothing changes on any
        for layer in self.layers:
            layer.load_state_dict(state["layers"][layer.name])
        self._count()
        self._load_budgets(state)
        self._compare_masks("load_state_dict")

    def _check_state(self, state):
        loading.check_entries("'mask'", state, [*loading.OF_ALL, *loading.OF_MASKING], ["sparse_training", "budgets"])
        loading.check_layers(self.layers, state["layers"])
        loading.check_masking(self, state)
