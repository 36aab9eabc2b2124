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

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparselearning.functions import surely_reads
from sparselearning.grow import momentum_growth
from sparselearning.layer import SparseLayer
from sparselearning.native.allocator import give_freed_memory, lay_large_blocks_apart
from sparselearning.patterns import UNSTRUCTURED
from sparselearning.processes import distributed
from sparselearning.sparse import optimizer_state
from sparselearning.sparse.growth import growing_forms
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.observing import Observing
from sparselearning.weights.regrowth import draw_new
from sparselearning.weights.zeros import Ahead, Layers


class SparseTraining(Observing):
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

    def before_step(self, layers: Layers, closure: Callable[..., Any] | None) -> None:
        """Give the optimizer the values.

        Raises:
            RuntimeError: if other processes have come after `add_module`.
        """
        if self.averaging is None and self.trained and distributed.in_process_group():
            raise RuntimeError("Start the process group (init_process_group) before add_module with weights='sparse'.")
        for module in self.trained.values():
            module.entries.beyond = None
            optimizer_state.compact(self.optimizer, module)
        lay_large_blocks_apart()  # what the optimizer begins to keep, and what it frees on the way
        super().before_step(layers, closure)

    def after_step(self, layers: Layers) -> None:
        """Let the next pass use again what this one has freed, if that is much."""
        lay_large_blocks_apart(self.outweighs_passes)
        super().after_step(layers)

    def apply(self, layers: Layers) -> None:
        """Let values follow masks that moved; forget what was written where weights are inactive."""
        moving = [layer for layer in self.layers.values() if layer.moves]
        for layer in moving:
            self.move(layer)
        for layer in self.layers.values():
            layer.stay()
            layer.entries.beyond = None
        if moving:
            give_freed_memory(self.bytes_held)
        self.carry = True
        super().apply([layer for layer in layers if not layer.compact])

    def refuse_update(self, layers: Layers) -> None:
        """Check that regrown weights can start as they are to."""
        for module in self.trained.values():
            optimizer_state.compact(self.optimizer, module)  # it may have been loaded
        super().refuse_update(layers)
        self.share()
        give_freed_memory(self.bytes_held)  # the update takes other sizes
        lay_large_blocks_apart()

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
            self.own_steps.follow(layer, merged.origin, self.steps_of(layer))
        else:  # the optimizer's state comes from the same file, and belongs to these entries
            optimizer_state.compact(self.optimizer, module)
        module.value.grad = None

    def grow(self, function: Callable[..., Any], layer: SparseLayer, number: int) -> bool:
        """Grow without dense tensors, if the function has such a form (growth.py) and the layer no pattern."""
        form, reads_gradient = growing_forms().get(function), surely_reads(function, "gradient")
        if form is None or not isinstance(layer, CompactLayer) or layer.pattern != UNSTRUCTURED:
            return False
        observed = layer.module.observed
        if (observed.among is None) if function is momentum_growth else (reads_gradient and observed.window != 1):
            return False
        layer.grow(form(self.optimizer, layer, number))
        return True

    def updated(self, ahead: Ahead) -> None:
        """End an update of the masks."""
        super().updated(ahead)
        lay_large_blocks_apart(self.outweighs_passes)

    def moved(self, layers: Layers, before: Sequence[Any]) -> None:
        """Follow masks that have moved; the layers that hold active weights alone follow in `apply`."""
        masked = [pair for pair in zip(layers, before, strict=True) if not pair[0].compact]
        super().moved([layer for layer, _ in masked], [mask for _, mask in masked])
