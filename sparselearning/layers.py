"""The sparse layers of a network: each weight with its mask and counts, and views, removal and saving of them all."""

import logging
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from sparselearning import loading
from sparselearning.budgets import Budget, Budgets, layers_of
from sparselearning.layer import SparseLayer
from sparselearning.orientation import Orientation
from sparselearning.processes import agreement, distributed
from sparselearning.processes.group import Group, current
from sparselearning.processes.sharded import fetch
from sparselearning.start.maskable import canonical_name
from sparselearning.start.names import plain_name

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
        raise KeyError(f"No masked weight is called {name!r}. There are {', '.join(self.densities)}.")

    def remove_weight_partial_name(self, partial_name: str, verbose: bool = False) -> None:
        """Train the weights whose name contains `partial_name` densely from now on; the log says which in any case."""
        self._remove([layer for layer in self.layers if partial_name in layer.name])

    def remove_type(self, nn_type: type[nn.Module] | tuple[type[nn.Module], ...], verbose: bool = False) -> None:
        """Train the weights held directly by modules of this type densely from now on; the log says which."""
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
