"""The steps of an optimizer, which a Masking watches by hooks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from sparselearning import invariants, reports
from sparselearning.layers import Layers
from sparselearning.processes.group import choose_group
from sparselearning.processes.sharded import refuse_hidden_weights, reshard
from sparselearning.weights.closures import closure_of, masked_closure, with_closure
from sparselearning.weights.destroyed import LOOKS, warn_of_written_weights
from sparselearning.weights.frozen import note_gradients
from sparselearning.weights.optimizer import chain_of
from sparselearning.weights.second_copies import SecondCopies
from sparselearning.weights.wrappers import Watched, watch
from sparselearning.weights.zeros import Zeros


class Steps(Layers, ABC):
    """The sparse layers of a network, told of every step of the optimizer that trains them."""

    optimizer: torch.optim.Optimizer  # it steps the weights
    stepper: Any  # that optimizer, or what wraps it
    held: Zeros
    looks_left = LOOKS
    _hooks: list[RemovableHandle | Watched]

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's, so that GradScaler.step(masking) takes a Masking. LR schedulers take the optimizer."""
        return self.stepper.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the optimizer does. (Apex's names the argument otherwise, or has none.)"""
        self.stepper.zero_grad(*(() if set_to_none else (False,)))

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Step the optimizer; the masks are applied right after, as after any step of the optimizer.

        A closure sees the masked network whenever the optimizer evaluates it.
        """
        return self.stepper.step(*(() if closure is None else (masked_closure(self, closure),)))

    def _watch_steps(self):
        self.held.copies = SecondCopies(chain_of(self.stepper))
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda _, *given: self._before_step(*given)),
            self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
            *self.held.attach(),
            *watch(self),
        ]
        invariants.MASKINGS.add(self)

    def _agree_and_count(self):
        self.held.agree(self.layers)
        super()._agree_and_count()

    def _remove(self, removed):
        super()._remove(removed)
        self.held.release(removed)

    def release(self) -> None:
        """Let go of the optimizer and the model: the weights train densely from now on, pruned ones from zero.

        A Masking does this by itself when another takes all its weights. It cannot be used again; make a new one.
        """
        self._remove(self.layers)
        for hook in self._hooks:
            hook.remove()
        self.modules, self._hooks = [], []
        invariants.MASKINGS.discard(self)

    def _begin(self, module, process_group, rescale):
        """Check that a module can be added, and let those processes share its masks which train it."""
        if rescale and self.held.keeps_inactive:
            raise ValueError(f"With weights={self.held.kind!r} magnitudes decide what is active; leave out rescale.")
        self._refuse_released()
        choose_group(self, module, process_group)
        refuse_hidden_weights(module)
        reshard([module])

    def _refuse_released(self):
        if not self._hooks:
            raise RuntimeError(
                "This Masking has been released, or another took its weights, and it masks nothing any more. Use the "
                "other one, or make a new Masking."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: entry for name, entry in self.__dict__.items() if name != "_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy (deepcopy, pickle): an optimizer's copy has lost its hooks, and would train unmasked."""
        vars(self).update(state)
        for layer in self.layers:
            layer.agree()
        self._watch_steps()

    def _before_step(self, args, kwargs):
        warn_of_written_weights(self)
        closure = closure_of(args, kwargs)
        if self.held.acts_before_steps:
            self._follow_weights()
            self.held.before_step(self.layers, closure)
        if closure is not None:
            return with_closure(args, kwargs, masked_closure(self, closure))
        note_gradients(self)
        return None

    def __repr__(self) -> str:
        return reports.in_one_line(self)

    @abstractmethod
    def _after_step(self):
        """Apply the masks after a step, and move them if an update is due."""
