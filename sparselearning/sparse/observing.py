"""Which steps are observed for growth, and what functions read of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.layer import SparseLayer
from sparselearning.loading import MOST_STEPS, check_entries, check_whole
from sparselearning.native.allocator import give_freed_memory
from sparselearning.patterns import UNSTRUCTURED
from sparselearning.processes import distributed
from sparselearning.sparse import optimizer_state
from sparselearning.sparse.batch_last import keep_order
from sparselearning.sparse.held import Held, Place
from sparselearning.sparse.holding import Holding
from sparselearning.sparse.kinds import kind_of, places_of, why_not
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.observed import Observed
from sparselearning.sparse.observed_state import check_observed, load_observed, state_of_observed
from sparselearning.sparse.sharing import Found, choose_together
from sparselearning.weights.optimizer import momentum_of
from sparselearning.weights.regrowth import gradient_scale
from sparselearning.weights.zeros import Ahead, Layers

WINDOW = 20  # steps before an update whose dense gradients are averaged: as many as a momentum of 0.9 averages
CANDIDATES = 2**16  # inactive weights of a layer whose gradients are averaged, if there are fewer active ones
EVERY = 10  # before the first update has shown how far apart updates are, every tenth step is observed


class Observing(Holding):
    """Layers that hold active weights alone, and the gradients of all their weights that growth reads."""

    def __init__(self, *, candidates: int = CANDIDATES, **settings: Any):
        super().__init__(**settings)
        if candidates < 1:
            raise ValueError(f"Expected at least 1 candidate in a layer, got {candidates}.")
        self.fewest_candidates = candidates
        self.since_update, self.carry = 0, True
        self.ahead: Ahead = (0.0, False)
        self.interval: int | None = None  # steps between the last two updates

    def add(self, module: nn.Module, layers: Layers, ahead: Ahead) -> list[SparseLayer]:
        """Train `layers`, masked weights inside `module`, on the kernels wherever there are some.

        The log says how many do, and why the others stay masked.
        """
        places, result = places_of(module), []
        for layer in layers:
            if reason := why_not(layer, places[id(layer.weight)]):
                self.reasons[layer.name] = reason
                result.append(layer)
                continue
            result.append(self.hold(layer, places[id(layer.weight)], ahead))
        self.roots.append(module)
        self.ahead = ahead
        keep_order(module)
        self.average(module)
        for layer in layers:
            if layer.name in self.trained:
                distributed.send_to_all(self.trained[layer.name].value.detach())
        self.own_steps.begin(result)
        self.tell(layers)
        give_freed_memory()
        return result

    def hold(self, layer: SparseLayer, places: Sequence[Place], ahead: Ahead) -> CompactLayer:
        """Let the modules at `places` hold the active weights of a layer alone."""
        for module, _ in places:
            module.__class__ = kind_of(module)
        position, value = layer.start_places, None
        if position is None:
            position = layer.mask.flatten().nonzero().flatten()
        else:
            value = layer.start_values.draw(len(position), layer.weight.dtype).mul_(layer.start_scale)
        held = Held(places, position, Observed(self.window, self.observes(*ahead)), value)
        compact = CompactLayer.of(layer, held)
        layer.start_places = None  # free it: there may be many such layers
        self.trained[layer.name], self.layers[layer.name] = held, compact
        optimizer_state.exchange(self.optimizer, held.dense, held.value)
        self.choose_observed(compact)
        return compact

    def choose_observed(self, layer: CompactLayer) -> None:
        """Say where the mean of observed gradients is kept: for functions that want it everywhere, everywhere."""
        number = max(layer.nonzeros, self.fewest_candidates)
        sparingly = self.sparingly and layer.pattern == UNSTRUCTURED and number < layer.zeros
        layer.module.observed.among = number if sparingly else None

    def stepped(self, ahead: Ahead) -> None:
        """Count a step; decide whether the next one observes dense gradients; see `observes`."""
        if not self.trained:
            return
        self.since_update, self.ahead = self.since_update + 1, ahead
        observing = self.observes(*ahead)
        for module in self.trained.values():
            module.observed.observing = observing

    def observes(self, left: float, by_steps: bool) -> bool:
        """Tell whether the next step observes dense gradients.

        It does on the last `window` steps before an update that a step triggers, which is `left` steps away. Unless
        steps trigger all updates (`by_steps`), the next update may also come as long after the last one as that came
        after the one before; it is then expected up to `WINDOW` steps early.
        """
        if not self.window:
            return False
        if left <= self.window or by_steps:
            return left <= self.window
        if self.interval is None:
            return self.since_update % EVERY == 0
        return self.since_update % self.interval >= self.interval - WINDOW

    def expect(self, steps: int) -> None:
        """Note that an update ends every so many steps: only the last `WINDOW` before it need observe gradients.

        Without this, the first update may come at any time, and every tenth step before it is observed.
        """
        self.interval = max(steps, 1)
        for module in self.trained.values():
            module.observed.observing = self.observes(*self.ahead)

    def updated(self, ahead: Ahead) -> None:
        """End an update of the masks: forget the gradients that were observed for it."""
        if not self.trained:
            return
        self.interval, self.since_update, self.ahead = max(self.since_update, 1), 0, ahead
        for module in self.trained.values():
            module.observed.forget()
            module.observed.observing = self.observes(*ahead)

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients observed since the last update of the masks, and when the next update is expected."""
        layers = {name: state_of_observed(module.observed) for name, module in self.trained.items()}
        return {"since_update": self.since_update, "interval": self.interval, "layers": layers}

    def check_state(self, state: dict[str, Any], layers: Layers, saved: dict[str, Any]) -> None:
        """Check the observed gradients in a saved state; one of masked training holds none.

        Raises:
            RuntimeError: if they do not fit.
        """
        check_entries("'sparse_training'", state, (), ("since_update", "interval", "layers"))
        check_whole("'since_update'", state.get("since_update", 0), 0, MOST_STEPS)
        if state.get("interval") is not None:
            check_whole("'interval'", state["interval"], 0, MOST_STEPS)
        names = [layer.name for layer in layers]
        observed = check_entries("'sparse_training'['layers']", state.get("layers", {}), (), names)
        for layer in layers:
            check_observed(layer, observed.get(layer.name, {}))

    def load_state_dict(self, state: dict[str, Any], layers: Layers) -> None:
        """Take what `state_dict` returned; an empty state stands for no observed gradients.

        Masks, weights and optimizer state come from the same checkpoint, and belong together already.
        """
        self.carry = False
        self.since_update, self.interval = state.get("since_update", 0), state.get("interval", self.interval)
        for name, module in self.trained.items():
            load_observed(module, state.get("layers", {}).get(name, {}))

    def give(self, layers: Layers) -> None:
        """Take the dense gradients that the optimizer is going to use."""
        scale = 1 / float(gradient_scale(self.optimizer))
        found: list[Found] = []
        overflowed = getattr(self.optimizer, "found_inf", None)  # a fused optimizer then skips the step
        for module in self.trained.values():
            if not module.dense.requires_grad:  # frozen
                module.value.grad = None
            if overflowed is not None and overflowed.item():
                module.observed.drop()
            else:
                found.append((module, module.observed.take(module, scale)))
        for module, seen in found if self.averaging is None else choose_together(found, self.averaging):
            module.observed.count(seen)
        super().give(layers)

    def gradient_is_known(self, layer: SparseLayer) -> bool:
        """Tell whether a gradient was observed since the last update."""
        if layer.name in self.trained:
            return self.trained[layer.name].observed.known
        return super().gradient_is_known(layer)

    def momentum_of(self, weight: Tensor) -> Tensor:
        """Return momentum where `weight` is active and the mean of its observed gradients elsewhere."""
        layer = self.layer_of(weight)
        if layer is None:
            return super().momentum_of(weight)
        module = layer.module
        optimizer_state.compact(self.optimizer, module)
        momentum = momentum_of(self.optimizer, module.value)
        if weight is layer.looks:
            return momentum
        mean = module.observed.mean()
        ascends = optimizer_state.group_of(self.optimizer, module)["maximize"]
        seen = torch.zeros(layer.shape, dtype=momentum.dtype) if mean is None else -mean if ascends else mean
        return seen.reshape(-1).scatter(0, module.entries.position, momentum).reshape(layer.shape)

    def gradient_of(self, weight: Tensor) -> Tensor:
        """Return the mean of the gradients observed since the last update.

        Raises:
            RuntimeError: if none was observed.
        """
        layer = self.layer_of(weight)
        if layer is None:
            return super().gradient_of(weight)
        observed = layer.module.observed
        in_rows = weight is layer.looks
        mean = observed.mean_at(layer.module, layer.entries.position) if in_rows else observed.mean()
        if mean is None:
            raise RuntimeError("No gradient was observed since the last update of the masks. Train a step in between.")
        return mean
