"""How weights are held while masks act on them: with zeros where they are inactive.

`Zeros` is what Masking calls; dense_copy.py and sparse/training.py hold weights in other ways, by doing something else
at the same moments.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparselearning.layer import SparseLayer
from sparselearning.native.zero import zero_inactive
from sparselearning.weights.optimizer import gradient_of, mixes_entries, momentum_of, state_of
from sparselearning.weights.own_steps import OwnSteps
from sparselearning.weights.regrowth import START_VALUES, pull_to_zero, start_regrown
from sparselearning.weights.second_copies import SecondCopies
from sparselearning.weights.start_states import START_STATES, refuse_unfit_state

Layers = Sequence[SparseLayer]
Ahead = tuple[float, bool]  # steps until the next update, and whether steps trigger all: schedules.Updates.ahead


class Zeros:
    """Inactive weights are zero, and lose their values.

        Masking(optimizer, decay, weights=Zeros(regrown="random", reset_state=True))

    Args:
        regrown: what a weight is when it becomes active: 'zero', or 'random', as torch initialises layers.
        reset_state: what the optimizer's state of a weight starts from when the weight becomes active: zero (True or
            'zero'), 'mean', the mean over the layer's active weights, or 'restart', zero with a time step of Adam's own
            for each weight; False leaves what the optimizer has.
        pull: how strongly active weights are pulled to zero: pull * sign(weight) is added to their gradients before
            every step.
        regrown_warm_up: over how many of its steps the learning rate of a weight that has grown rises to its value.
        lr_by_density: divide the learning rate of each layer by the square root of its density.

    Raises:
        ValueError: for an unknown `regrown` or `reset_state`, a negative or infinite pull, or no number of steps.
    """

    kind = "zero"
    exchanges = False  # whether the optimizer steps other tensors than the network sees
    keeps_inactive = False  # whether inactive weights keep their values
    optimizer: torch.optim.Optimizer  # set by Masking, as the next
    window: int  # steps before an update whose dense gradients its functions read
    sparingly: bool  # whether its functions do without the mean gradients of most inactive weights

    def __init__(
        self,
        *,
        regrown: str = "zero",
        reset_state: bool | str = False,
        pull: float = 0.0,
        regrown_warm_up: int = 0,
        lr_by_density: bool = False,
    ):
        if regrown not in START_VALUES:
            raise ValueError(f"Unknown regrown {regrown!r}. Choose one of {', '.join(map(repr, START_VALUES))}.")
        if reset_state not in (False, True, *START_STATES):
            names = ", ".join(map(repr, START_STATES))
            raise ValueError(f"Unknown reset_state {reset_state!r}. Choose False, True or one of {names}.")
        if not 0 <= pull < math.inf:
            raise ValueError(f"Expected a pull of at least 0, got {pull}.")
        self.regrown, self.pull = regrown, pull
        self.reset_state = True if reset_state == "zero" else reset_state
        self.own_steps = OwnSteps(reset_state == "restart", regrown_warm_up, lr_by_density)
        self.corrects_steps = bool(self.own_steps)  # whether some weights make other steps than the optimizer's
        self.copies = SecondCopies([])  # of the weights; set by Masking
        self.ready = False  # the optimizer was given what it is to step
        self.borrowed: dict[Tensor, dict[str, Tensor]] = {}  # momenta that other processes hold, during an update
        self.gradients: dict[Tensor, Tensor] = {}  # dense ones, of an optimizer that is given masked ones

    @property
    def start_state(self) -> str | None:
        """What the optimizer's state of a regrown weight starts from, one of START_STATES; None if nothing is set."""
        return self.reset_state if isinstance(self.reset_state, str) else "zero" if self.reset_state else None

    @property
    def acts_before_steps(self) -> bool:
        """Whether `before_step` does anything."""
        return self.exchanges or self.pull > 0 or self.mixes or self.corrects_steps

    @property
    def bytes_per_step(self) -> float | None:
        """What this process sent for each step, if it was counted; dense parts apart."""
        return None

    @cached_property
    def mixes(self) -> bool:
        """Whether the optimizer joins the gradients of all weights into one direction."""
        return mixes_entries(self.optimizer)

    def attach(self) -> list[RemovableHandle]:
        """Register hooks, and return them; also in a copy of the optimizer and the layers, which has lost them."""
        return []

    def make_real(self, module: nn.Module, new: Mapping[str, SparseLayer]) -> list[SparseLayer]:
        """Give a module real tensors for those on the meta device, but for weights that need none; return the layers.

        Raises:
            ValueError: if it has some, and weights are not held by their active entries alone.
        """
        if names := [name for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_meta]:
            raise ValueError(
                f"Expected a model with values, got {', '.join(names[:3])} on the meta device. Use weights='sparse', "
                "which draws active values alone, or build the model on a real device."
            )
        return list(new.values())

    def check(self, module: nn.Module, layers: Layers) -> None:
        """Check that the weights of `layers` in `module` can be held this way; nothing is changed yet."""

    def add(self, module: nn.Module, layers: Layers, ahead: Ahead) -> list[SparseLayer]:
        """Begin to hold the weights of `layers` in `module`; return the layers, or others in their place."""
        self.own_steps.begin(layers)
        return list(layers)

    def release(self, layers: Layers) -> None:
        """Let go of weights that stay dense from now on."""

    @torch.no_grad()
    def before_step(self, layers: Layers, closure: Callable[..., Any] | None) -> None:
        """Give the optimizer what it is to step; if it evaluates a closure, that comes after each evaluation."""
        if closure is None and not (self.ready and self.copies.wrapped):  # a wrapper may have evaluated a closure
            self.give(layers)
        if self.corrects_steps:
            self.own_steps.remember(layers, self.stepped_for)

    @torch.no_grad()
    def before_evaluation(self, layers: Layers) -> None:
        """Show a closure the masked network, with what the optimizer has changed since the last evaluation."""
        self.after_step(layers)
        self.apply(layers)

    @torch.no_grad()
    def after_evaluation(self, layers: Layers) -> None:
        """Give the optimizer what it is to step, with the gradients of a closure."""
        self.give(layers)
        self.ready = True

    def give(self, layers: Layers) -> None:
        """Give the optimizer what it is to step; the gradients are there."""
        self.pull_weights(layers)
        if self.mixes:
            self.keep_to_masks(layers)

    def keep_to_masks(self, layers: Layers) -> None:
        """Set the gradients of inactive weights to zero, and keep those of all weights for growth."""
        self.gradients = {}
        for layer in layers:
            if (gradient := layer.master.grad) is not None:
                self.gradients[layer.master] = gradient.clone()
                zero_inactive([gradient], [layer.mask])

    def pull_weights(self, layers: Layers) -> None:
        """Pull the active weights to zero."""
        if self.pull:
            pull_to_zero([self.stepped_for(layer) for layer in layers], self.pull, self.optimizer)

    def after_step(self, layers: Layers) -> None:
        """Take over what the optimizer has left; also of a step that it skipped."""
        self.ready = False

    def correct_step(self, layers: Layers) -> None:
        """Make the steps of single weights that are not the optimizer's; not after a step that it skipped."""
        self.own_steps.correct(layers, self.optimizer, self.stepped_for)

    def stepped(self, ahead: Ahead) -> None:
        """Count a step."""

    def refuse_update(self, layers: Layers) -> None:
        """Check that regrown weights can start as they are to; the masks are going to move.

        Raises:
            RuntimeError: if they cannot.
        """
        refuse_unfit_state(self.start_state, self.optimizer, map(self.stepped_for, layers))

    def grow(self, function: Callable[..., Any], layer: SparseLayer, number: int) -> bool:
        """Grow weights of a layer as a growth function would, without dense tensors; tell whether that is possible."""
        return False

    def agree(self, layers: Layers) -> None:
        """Let layers without masks move as on the first process."""

    def share(self) -> None:
        """Let all processes hold the same, so that one of them can save it; all call it."""

    def moved(self, layers: Layers, before: Sequence[Any]) -> None:
        """Follow masks that have moved; `before` is what they were."""
        start_regrown(layers, before, self.optimizer, self.regrown, self.start_state, self.copies.copies)
        for layer, old in zip(layers, before, strict=True) if self.corrects_steps else ():
            self.own_steps.note(layer, layer.mask & ~old, self.steps_of(layer))
        if self.mixes:
            self.optimizer.state.clear()  # the directions that it remembers are those of other weights

    def steps_of(self, layer: SparseLayer) -> int:
        """Return how many steps the optimizer has made of a layer, where steps of single weights are asked for."""
        return int(state_of(self.optimizer, self.stepped_for(layer)).get("step", 0)) if self.corrects_steps else 0

    def expect(self, steps: int) -> None:
        """Note that an update of the masks ends every so many steps, as at the end of epochs."""

    def updated(self, ahead: Ahead) -> None:
        """End an update of the masks."""

    @torch.no_grad()
    def apply(self, layers: Layers) -> None:
        """Set inactive weights to zero, in place, also in copies that the optimizer keeps."""
        halves = [layer for layer in layers if layer.weight is not layer.master]
        tensors, masks = [layer.master for layer in layers], [layer.mask for layer in layers]
        if halves:
            tensors += [layer.weight for layer in halves]
            masks += [layer.mask for layer in halves]
        for layer in layers:
            for _, copy in self.copies_of(layer):
                tensors.append(copy)
                masks.append(layer.mask.to(copy.device))
        zero_inactive(tensors, masks)

    def copies_of(self, layer: SparseLayer) -> Iterable[tuple[str, Tensor]]:
        """Return name and tensor of each copy of a weight that the optimizer keeps."""
        return self.copies.of(layer.master, layer.mask)

    def describe(self, layer: SparseLayer) -> str:
        """Return how the layer's weight is held, in a few words; empty for zeros."""
        return ""

    def trained_density(self, layer: SparseLayer) -> float:
        """Return the fraction of the layer's weights that the optimizer trains."""
        return layer.density

    def trained_mask(self, layer: SparseLayer) -> Tensor | None:
        """Return which entries of `stepped_for(layer)` the optimizer trains; None for all."""
        return layer.mask

    def stepped_for(self, layer: SparseLayer) -> Tensor:
        """Return what the optimizer steps for a layer."""
        return layer.master

    def stepped_weights(self) -> set[int]:
        """Return the ids of weights in whose place the optimizer steps another tensor."""
        return set()

    def has_gradient(self, layer: SparseLayer) -> bool:
        """Tell whether the optimizer finds a gradient for a layer."""
        return self.stepped_for(layer).grad is not None

    def gradient_is_known(self, layer: SparseLayer) -> bool:
        """Tell whether `gradient_of` has a gradient for a layer."""
        return layer.master in self.gradients or self.has_gradient(layer)

    def momentum_of(self, weight: Tensor) -> Tensor:
        """Return the momentum of a weight."""
        return momentum_of(self.optimizer, weight, self.borrowed.get(weight))

    def gradient_of(self, weight: Tensor) -> Tensor:
        """Return the gradient of a weight."""
        return self.gradients[weight] if weight in self.gradients else gradient_of(weight)

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved besides masks and weights."""
        return {}

    def check_state(self, state: dict[str, Any], layers: Layers, saved: dict[str, Any]) -> None:
        """Check what `load_state_dict` would take, and the saved states of the layers, by name; nothing is changed.

        Raises:
            RuntimeError: if it does not fit.
        """

    def load_state_dict(self, state: dict[str, Any], layers: Layers) -> None:
        """Take what `state_dict` returned."""
