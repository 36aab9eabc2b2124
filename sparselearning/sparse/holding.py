"""Which layers hold their active weights alone, and what the optimizer steps in place of their weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselearning.layer import SparseLayer
from sparselearning.native.allocator import lay_large_blocks_apart
from sparselearning.patterns import with_pattern
from sparselearning.processes import distributed
from sparselearning.processes.group import current
from sparselearning.processes.sharded import is_sharded
from sparselearning.sparse import optimizer_state
from sparselearning.sparse.averaging import Averaging, leave_out, refuse_earlier, take_in
from sparselearning.sparse.batch_last import forget_order
from sparselearning.sparse.held import Held
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.kinds import places_of, why_not
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.recorded import recorded
from sparselearning.sparse.sharing import move_as_first, share
from sparselearning.sparse.unborn import materialise
from sparselearning.weights.zeros import Layers, Zeros

TENSORS_HELD = 7  # as long as the values: with gradient, two moments of Adam, three of indices
TENSORS_OF_A_PASS = 3  # as large as a layer's output: it, its gradient, and the gradient of the input

logger = logging.getLogger(__name__)


class Holding(Zeros):
    """The layers of a Masking that hold active weights alone, and the optimizer that steps their values."""

    kind = "sparse"
    exchanges = True

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        kernels()  # says so if there are none
        self.roots: list[nn.Module] = []
        self.trained: dict[str, Held] = {}  # by the layer's name
        self.layers: dict[str, CompactLayer] = {}  # of these, by name
        self.reasons: dict[str, str] = {}  # why other layers stay masked, by name
        self.arriving: list[tuple[Held, Tensor]] = []  # of an optimizer's state that is being loaded
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
        lay_large_blocks_apart()  # until a step shows how large passes are
        if not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            return list(new.values())
        self.check(module, [*new.values()])  # before anything is changed
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
    def outweighs_passes(self) -> bool:
        """Whether what is held takes more memory than a pass does; then pages for a pass cost little time."""
        return sum(module.output for module in self.trained.values()) * TENSORS_OF_A_PASS <= self.bytes_held

    @property
    def bytes_held(self) -> int:
        """About how many bytes values, gradients, optimizer state and indices take."""
        return sum(module.value.nbytes for module in self.trained.values()) * TENSORS_HELD

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

    def layer_of(self, weight: Tensor) -> CompactLayer | None:
        """Return the layer whose weight this is, or whose active weights, while functions look at these."""
        return next((x for x in self.layers.values() if x.module.dense is weight or x.looks is weight), None)
