"""Train on active weights alone: forward and both gradients on sparse kernels, and no tensor as large as the weight.

A layer holds its values, and where they are; see `Entries`. This differs from exact sparse momentum (Dettmers &
Zettlemoyer 2019, https://arxiv.org/abs/1907.04840), whose momentum is dense: here the optimizer keeps state for active
weights alone. Growth by momentum scores an inactive weight by the mean of its gradient over the last `WINDOW` steps
before an update; in large layers, those inactive weights alone whose gradient is largest in the first of these steps
(`candidates`). Growth by the gradient takes that of the last step, as RigL does (Evci et al. 2020,
https://arxiv.org/abs/1911.11134), computed block by block (growing.py). Other growth observes no gradient. When a
weight grows, SGD's momentum starts as if that mean had been its gradient all along, and other optimizers' state at
zero, unless `reset_state` says otherwise. Pruning and redistribution, which read active weights, are the paper's.
Gradients are those that a step used: scaled back, clipped, and none of a batch that the loop skipped.

Functions of a user's own are given dense tensors, computed layer by layer. An optimizer's state_dict holds dense
tensors, so that it is the same as that of masked or dense training; in a checkpoint it is as small as it is here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselearning.functions import surely_reads
from sparselearning.grow import momentum_growth
from sparselearning.layer import SparseLayer
from sparselearning.loading import MOST_STEPS, check_entries, check_whole
from sparselearning.patterns import UNSTRUCTURED, with_pattern
from sparselearning.processes import distributed
from sparselearning.processes.group import current
from sparselearning.processes.sharded import is_sharded
from sparselearning.sparse import optimizer_state
from sparselearning.sparse.averaging import Averaging, leave_out, refuse_earlier, take_in
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.growth import growing_forms
from sparselearning.sparse.held import Held, Place
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.kinds import kind_of, places_of, why_not
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.observed import Observed
from sparselearning.sparse.observed_state import check_observed, load_observed, state_of_observed
from sparselearning.sparse.recorded import recorded
from sparselearning.sparse.sharing import Found, choose_together, move_as_first, share
from sparselearning.sparse.unborn import materialise
from sparselearning.weights.optimizer import momentum_of
from sparselearning.weights.regrowth import draw_new, gradient_scale
from sparselearning.weights.zeros import Ahead, Layers, Zeros

logger = logging.getLogger(__name__)

WINDOW = 20  # steps before an update whose dense gradients are averaged: as many as a momentum of 0.9 averages
CANDIDATES = 2**16  # inactive weights of a layer whose gradients are averaged, if there are fewer active ones
EVERY = 10  # before the first update has shown how far apart updates are, every tenth step is observed


class SparseTraining(Zeros):
    """The layers of a Masking that train on sparse kernels, and the optimizer's state of their active weights.

    Weights of other modules than those of `kinds.KINDS`, and dtypes without kernels, stay masked.

    Args:
        candidates: inactive weights of a layer whose mean gradients growth by momentum compares, at least; as many as
            there are active ones if that is more. A layer that has fewer compares all.
        settings: as `Zeros` takes them.

    Raises:
        ValueError: for a number of candidates below 1.
        RuntimeError: if the installation has no sparse kernels.
    """

    kind = "sparse"
    exchanges = True

    def __init__(self, *, candidates: int = CANDIDATES, **settings: Any):
        super().__init__(**settings)
        if candidates < 1:
            raise ValueError(f"Expected at least 1 candidate in a layer, got {candidates}.")
        self.fewest_candidates = candidates
        kernels()  # says so if there are none
        self.roots: list[nn.Module] = []
        self.trained: dict[str, Held] = {}  # by the layer's name
        self.layers: dict[str, CompactLayer] = {}  # of these, by name
        self.reasons: dict[str, str] = {}  # why other layers stay masked, by name
        self.arriving: list[tuple[Held, Tensor]] = []  # of an optimizer's state that is being loaded
        self.since_update, self.carry = 0, True
        self.ahead: Ahead = (0.0, False)
        self.interval: int | None = None  # steps between the last two updates
        self.averaging: Averaging | None = None  # of gradients, where several processes train

    def attach(self) -> list[RemovableHandle]:
        """Save the optimizer's state in dense form; hold the weights again where this is a copy."""
        for layer in self.layers.values():
            layer.module.attach()
            layer.stay()
        for root in self.roots:
            self.average(root)
        save, optimizer = optimizer_state.save, self.optimizer
        return [
            optimizer.register_state_dict_post_hook(lambda _, saved: save(optimizer, saved, self.trained)),
            optimizer.register_load_state_dict_pre_hook(lambda _, saved: self.arrive(saved)),
            optimizer.register_load_state_dict_post_hook(lambda _: self.arrived()),
        ]

    def arrive(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the state_dict that an optimizer loads, without the places of the entries that it is of."""
        saved, self.arriving = optimizer_state.arriving(self.optimizer, saved, self.trained)
        return saved

    def arrived(self) -> None:
        """Note where the entries of a loaded state are, until it follows those here (`optimizer_state.compact`)."""
        for module, position in self.arriving:
            module.loaded = position
        self.arriving = []

    def make_real(self, module: nn.Module, new: Mapping[str, SparseLayer]) -> list[SparseLayer]:
        """Give a module real tensors for those on the meta device, but for weights that the kernels take.

        Of these the active values will be drawn, as the module's `reset_parameters` draws all (recorded.py). The
        optimizer steps the new parameters.

        Raises:
            ValueError: if a module does not say how its tensors start; nothing is changed then.
        """
        if not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            return list(new.values())
        places = places_of(module)
        unborn = {id(x.weight): x for x in new.values() if x.weight.is_meta and not why_not(x, places[id(x.weight)])}
        for layer in unborn.values():
            layer.start_values = recorded(*places[id(layer.weight)][0], layer.name)
        made = materialise(module, [places[weight][0] for weight in unborn])
        for old, parameter in made.items():
            optimizer_state.exchange(self.optimizer, old, parameter)
        for layer in new.values():
            if isinstance(layer.weight, nn.Parameter) and layer.weight in made:
                layer.weight = layer.master = made[layer.weight]
                layer.mask = with_pattern(torch.zeros_like(layer.weight, dtype=torch.bool), layer.pattern)
                layer.ever_active = layer.mask.clone()
        return list(new.values())

    def check(self, module: nn.Module, layers: Layers) -> None:
        """Check that some of the layers can train on sparse kernels.

        Raises:
            ValueError: if none can, naming the reasons; if weights are sharded, if DistributedDataParallel was made
                before, or if the optimizer steps matrices.
        """
        optimizer_state.refuse_shaped(self.optimizer)
        if any(is_sharded(layer.weight) for layer in layers):
            raise ValueError(
                "weights='sparse' trains whole weights, and these are sharded (FSDP2, tensor parallelism). Use "
                "DistributedDataParallel, or weights='zero'."
            )
        if type(self.optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "weights='sparse' replaces parameters that ZeroRedundancyOptimizer has divided among processes. Use "
                "its inner optimizer, whose state is that of active weights alone, or weights='zero'."
            )
        refuse_earlier(module)
        places = places_of(module)
        reasons = {why_not(layer, places[id(layer.weight)]) for layer in layers}
        if "" not in reasons:
            raise ValueError(
                f"weights='sparse' trains linear, convolution and attention layers on sparse kernels, and "
                f"{type(module).__name__} has none that could: {'; '.join(sorted(reasons))}. Use weights='zero'."
            )

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
        self.tell(layers)
        return result

    def average(self, root: nn.Module) -> None:
        """Average gradients of values over processes in DistributedDataParallel's passes, if several train `root`."""
        leave_out(root)
        if not distributed.in_process_group():
            return
        self.averaging = self.averaging or Averaging(current())
        self.averaging.watch(root)
        for module in self.trained.values():
            if module.member is None:
                module.member = self.averaging.member(module.value, module.complete)

    @property
    def bytes_per_step(self) -> float | None:
        """What this process sent for each step: averages of gradients, and its part of updates. None in one process."""
        return None if self.averaging is None else self.averaging.traffic.per_pass

    def agree(self, layers: Layers) -> None:
        """Let entries leave and come as on the first process."""
        if self.averaging is not None:
            move_as_first([layer for layer in layers if isinstance(layer, CompactLayer)], self.averaging)

    def share(self) -> None:
        """Average what was observed over the processes."""
        if self.averaging is not None and self.window:
            share([*self.trained.values()], self.averaging)

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
        self.trained[layer.name], self.layers[layer.name] = held, compact
        optimizer_state.exchange(self.optimizer, held.dense, held.value)
        self.choose_observed(compact)
        return compact

    def choose_observed(self, layer: CompactLayer) -> None:
        """Say where the mean of observed gradients is kept: for functions that want it everywhere, everywhere."""
        number = max(layer.nonzeros, self.fewest_candidates)
        sparingly = self.sparingly and layer.pattern == UNSTRUCTURED and number < layer.zeros
        layer.module.observed.among = number if sparingly else None

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
            self.layers.pop(layer.name)
            weight, member = module.dense, module.member
            optimizer_state.exchange(self.optimizer, module.value, weight)
            if state := self.optimizer.state.get(weight):
                state.update(optimizer_state.in_dense_form(state, module))
            module.end()
            if self.averaging is not None and member is not None:
                self.averaging.let_go(member, weight, self.roots)
            else:
                take_in(weight, self.roots)
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

    def before_step(self, layers: Layers, closure: Callable | None) -> None:
        """Give the optimizer the values.

        Raises:
            RuntimeError: if other processes have come after `add_module`.
        """
        if self.averaging is None and self.trained and distributed.in_process_group():
            raise RuntimeError("Start the process group (init_process_group) before add_module with weights='sparse'.")
        for module in self.trained.values():
            module.entries.beyond = None
            optimizer_state.compact(self.optimizer, module)
        super().before_step(layers, closure)

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

    def apply(self, layers: Layers) -> None:
        """Let values follow masks that moved; forget what was written where weights are inactive."""
        for layer in self.layers.values():
            if layer.moves:
                self.move(layer)
            layer.stay()
            layer.entries.beyond = None
        self.carry = True
        super().apply([layer for layer in layers if not layer.compact])

    def refuse_update(self, layers: Layers) -> None:
        """Check that regrown weights can start as they are to."""
        for module in self.trained.values():
            optimizer_state.compact(self.optimizer, module)  # it may have been loaded
        super().refuse_update(layers)
        self.share()

    @torch.no_grad()
    def move(self, layer: CompactLayer) -> None:
        """Let values and optimizer state follow a mask that moved."""
        module = layer.module
        if self.carry:
            optimizer_state.compact(self.optimizer, module)
        merged = layer.settle()
        if self.carry:
            if self.regrown == "random":
                draw_new(layer, merged.origin < 0)
            mean = module.observed.mean_at(module, merged.new)
            settings = self.start_state, self.copies.copies
            optimizer_state.carry_over(self.optimizer, module, merged.origin, mean, *settings)
        else:  # the optimizer's state comes from the same file, and belongs to these entries
            optimizer_state.compact(self.optimizer, module)
        module.value.grad = None

    def grow(self, function: Callable, layer: SparseLayer, number: int) -> bool:
        """Grow without dense tensors, if the function has such a form (growth.py) and the layer no pattern."""
        form, reads_gradient = growing_forms().get(function), surely_reads(function, "gradient")
        if form is None or not isinstance(layer, CompactLayer) or layer.pattern != UNSTRUCTURED:
            return False
        observed = layer.module.observed
        if (observed.among is None) if function is momentum_growth else (reads_gradient and observed.window != 1):
            return False
        layer.grow(form(self.optimizer, layer, number))
        return True

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

    def moved(self, layers: Layers, before: Sequence[Any]) -> None:
        """Follow masks that have moved; the layers that hold active weights alone follow in `apply`."""
        masked = [pair for pair in zip(layers, before, strict=True) if not pair[0].compact]
        super().moved([layer for layer, _ in masked], [mask for _, mask in masked])

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

    def layer_of(self, weight: Tensor) -> CompactLayer | None:
        """Return the layer whose weight this is, or whose active weights, while functions look at these."""
        return next((x for x in self.layers.values() if x.module.dense is weight or x.looks is weight), None)
