"""Train on sparse kernels: forward and both gradients touch active weights only.

This differs from exact sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840), whose momentum
is dense: here the optimizer keeps state for active weights alone. Growth by momentum scores an inactive weight by the
mean of its gradient over the last `WINDOW` steps before an update. Growth by the gradient takes that of the last step,
as RigL does (Evci et al. 2020, https://arxiv.org/abs/1911.11134). Other growth observes no dense gradient. When a
weight grows, SGD's momentum starts as if that mean had been its gradient all along, and other optimizers' state at
zero, unless `reset_state` says otherwise. Pruning and redistribution, which read active weights, are the paper's.
Gradients are those that a step used: scaled back, clipped, and none of a batch that the loop skipped.

An optimizer's state_dict holds dense tensors, so that it is the same as that of masked or dense training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselearning.layers import SparseLayer
from sparselearning.loading import MOST_STEPS, check_entries, check_whole
from sparselearning.processes import distributed
from sparselearning.sparse import optimizer_state
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.observed import check_observed
from sparselearning.sparse.trained import KINDS, Trained, owners_of, why_not
from sparselearning.weights.optimizer import momentum_of
from sparselearning.weights.regrowth import gradient_scale
from sparselearning.weights.zeros import Ahead, Layers, Zeros

logger = logging.getLogger(__name__)

WINDOW = 20  # steps before an update whose dense gradients are averaged: as many as a momentum of 0.9 averages
EVERY = 10  # before the first update has shown how far apart updates are, every tenth step is observed


class SparseTraining(Zeros):
    """The layers of a Masking that train on sparse kernels, and the optimizer's state of their active weights.

    Weights of other modules than linear and convolution layers, tied weights, and dtypes without kernels stay masked.

    Args:
        settings: as `Zeros` takes them.

    Raises:
        RuntimeError: if the installation has no sparse kernels.
    """

    kind = "sparse"
    exchanges = True

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        kernels()  # says so if there are none
        self.roots: list[nn.Module] = []
        self.trained: dict[str, Trained] = {}  # by the layer's name
        self.reasons: dict[str, str] = {}  # why other layers stay masked, by name
        self.versions: dict[str, int] = {}  # of the mask that a layer's values follow
        self.since_update, self.carry = 0, True
        self.ahead: Ahead = (0.0, False)
        self.interval: int | None = None  # steps between the last two updates

    def attach(self) -> list[RemovableHandle]:
        """Save the optimizer's state in dense form; hold the weights again where this is a copy."""
        for module in self.trained.values():
            module.attach()
        save = optimizer_state.save
        return [
            self.optimizer.register_state_dict_post_hook(lambda _, saved: save(self.optimizer, saved, self.trained))
        ]

    def check(self, module: nn.Module, layers: Layers) -> None:
        """Check that some of the layers can train on sparse kernels.

        Raises:
            ValueError: if none can, naming the reasons; if several processes train, or the optimizer steps matrices.
        """
        optimizer_state.refuse_shaped(self.optimizer)
        if distributed.in_process_group():
            raise ValueError("weights='sparse' trains in one process; leave it out under torchrun.")
        owners = owners_of(module)
        reasons = {why_not(layer, owners[id(layer.weight)]) for layer in layers}
        if "" not in reasons:
            raise ValueError(
                f"weights='sparse' trains linear and convolution layers on sparse kernels, and {type(module).__name__} "
                f"has none that could: {'; '.join(sorted(reasons))}. Use weights='zero'."
            )

    def add(self, module: nn.Module, layers: Layers, ahead: Ahead) -> None:
        """Train `layers`, masked weights inside `module`, on the kernels wherever there are some.

        The log says how many do, and why the others stay masked.
        """
        owners = owners_of(module)
        for layer in layers:
            if reason := why_not(layer, owners[id(layer.weight)]):
                self.reasons[layer.name] = reason
                continue
            (owner,) = owners[id(layer.weight)]
            owner.__class__ = KINDS[type(owner)]
            assert isinstance(owner, Trained)
            owner.begin(self.window, observing=self.observes(*ahead))
            self.trained[layer.name] = owner
            optimizer_state.exchange(self.optimizer, layer.weight, owner.value)
        self.roots.append(module)
        self.ahead = ahead
        keep_order(module)
        self.tell(layers)

    def tell(self, layers: Layers) -> None:
        """Log how many of these layers train on sparse kernels; warn if some do not, and why."""
        masked = [f"{layer.name} ({self.reasons[layer.name]})" for layer in layers if layer.name in self.reasons]
        log = logger.warning if masked else logger.info
        rest = f"; masked on dense kernels: {', '.join(masked)}" if masked else ""
        log("%d of %d layers train on sparse kernels%s.", len(layers) - len(masked), len(layers), rest)

    def release(self, layers: Layers) -> None:
        """Train these weights densely again."""
        for layer in layers:
            if (module := self.trained.pop(layer.name, None)) is None:
                continue
            self.versions.pop(layer.name)
            optimizer_state.exchange(self.optimizer, module.value, layer.weight)
            if state := self.optimizer.state.get(layer.weight):
                state.update(optimizer_state.in_dense_form(state, module))
            module.end()
        if not self.trained:
            for root in self.roots:
                forget_order(root)

    def describe(self, layer: SparseLayer) -> str:
        """Return whether the layer trains on sparse kernels, or why it does not."""
        return "sparse kernels" if layer.name in self.trained else f"masked: {self.reasons[layer.name]}"

    def trained_mask(self, layer: SparseLayer) -> Tensor | None:
        """Return None for a layer whose values are all active."""
        return None if layer.name in self.trained else layer.mask

    def stepped_weights(self) -> set[int]:
        """Return the ids of the dense weights whose values the optimizer steps."""
        return {id(module.dense) for module in self.trained.values()}

    def stepped_for(self, layer: SparseLayer) -> Tensor:
        """Return what the optimizer steps for a layer: its values here, or its dense weight."""
        return self.trained[layer.name].value if layer.name in self.trained else layer.master

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients observed since the last update of the masks, and when the next update is expected."""
        layers = {name: module.observed.state_dict() for name, module in self.trained.items()}
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
            module.observed.load_state_dict(state.get("layers", {}).get(name, {}), module.dense.device)

    def before_step(self, layers: Layers, closure: Callable | None) -> None:
        """Give the optimizer the values."""
        for module in self.trained.values():
            module.agree()
            optimizer_state.compact(self.optimizer, module)
        super().before_step(layers, closure)

    def give(self, layers: Layers) -> None:
        """Take the dense gradients that the optimizer is going to use."""
        scale = 1 / float(gradient_scale(self.optimizer))
        overflowed = getattr(self.optimizer, "found_inf", None)  # a fused optimizer then skips the step
        for module in self.trained.values():
            if not module.dense.requires_grad:  # frozen
                module.value.grad = None
            if overflowed is not None and overflowed.item():
                module.observed.drop()
            else:
                module.observed.take(module.position, scale)
        super().give(layers)

    def after_step(self, layers: Layers) -> None:
        """Write the values into the weights."""
        super().after_step(layers)
        for module in self.trained.values():
            module.write()

    def apply(self, layers: Layers) -> None:
        """Let values follow masks that moved, and weights that somebody wrote; set inactive weights to zero."""
        for layer in layers:
            if (module := self.trained.get(layer.name)) is None:
                continue
            if self.versions.get(layer.name) != layer.mask._version:
                self.move(layer, module)
            module.agree()
        self.carry = True
        super().apply([layer for layer in layers if layer.name not in self.trained])

    def refuse_update(self, layers: Layers) -> None:
        """Check that regrown weights can start as they are to."""
        for module in self.trained.values():
            optimizer_state.compact(self.optimizer, module)  # it may have been loaded
        super().refuse_update(layers)

    def move(self, layer: SparseLayer, module: Trained) -> None:
        """Let values and optimizer state follow a mask."""
        self.versions[layer.name] = layer.mask._version
        position = getattr(module, "position", None)
        if position is not None and torch.equal(position, layer.mask.flatten().nonzero().flatten()):
            return
        module.follow(layer.mask)
        if self.carry and position is not None:
            optimizer_state.carry_over(
                self.optimizer, module, position, layer.mask, self.start_state, self.copies.copies
            )
        optimizer_state.compact(self.optimizer, module)
        module.value.grad = None

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

    def gradient_is_known(self, layer: SparseLayer) -> bool:
        """Tell whether a gradient was observed since the last update."""
        if layer.name in self.trained:
            return self.trained[layer.name].observed.sum is not None
        return super().gradient_is_known(layer)

    def momentum_of(self, weight: Tensor) -> Tensor:
        """Return momentum where `weight` is active and the mean of its observed gradients elsewhere."""
        module = self.owner_of(weight)
        if module is None:
            return super().momentum_of(weight)
        optimizer_state.compact(self.optimizer, module)
        momentum, mean = momentum_of(self.optimizer, module.value), module.observed.mean()
        ascends = optimizer_state.group_of(self.optimizer, module)["maximize"]
        seen = torch.zeros_like(weight) if mean is None else -mean if ascends else mean
        return seen.reshape(-1).scatter(0, module.position, momentum).reshape(weight.shape)

    def gradient_of(self, weight: Tensor) -> Tensor:
        """Return the mean of the gradients observed since the last update.

        Raises:
            RuntimeError: if none was observed.
        """
        module = self.owner_of(weight)
        if module is None:
            return super().gradient_of(weight)
        mean = module.observed.mean()
        if mean is None:
            raise RuntimeError("No gradient was observed since the last update of the masks. Train a step in between.")
        return mean

    def owner_of(self, weight: Tensor) -> Trained | None:
        """Return the layer that trains `weight` here, if there is one."""
        return next((module for module in self.trained.values() if module.dense is weight), None)
