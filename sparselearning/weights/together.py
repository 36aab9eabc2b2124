"""Several optimizers of one network as one: Muon for its matrices beside AdamW for the rest.

masking = Masking([muon, adamw], decay, redistribution_mode="magnitude")
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sparselearning.weights.optimizer import torch_optimizer


def members_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that an optimizer consists of: several, or itself."""
    return optimizer.members if isinstance(optimizer, Together) else [optimizer]


def optimizer_of(given: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Return the torch optimizer of what Masking was given, and what steps it: wrappers, or several together."""
    stepper = Together(given) if isinstance(given, list | tuple) else given
    return torch_optimizer(stepper), stepper


class Handles:
    """Handles of hooks that are removed together."""

    def __init__(self, handles: Iterable[RemovableHandle]):
        self.handles = list(handles)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


class Together(torch.optim.Optimizer):
    """Optimizers that step one network. Each is stepped by the loop, or all by `step`; together they count as one step.

    Raises:
        ValueError: if there is none, or two step the same weight.
    """

    def __init__(self, steppers: Sequence[Any]):
        self.steppers = list(steppers)
        self.members = [torch_optimizer(stepper) for stepper in self.steppers]
        self.behind = list(self.members)  # that have not stepped since all had
        weights = [id(weight) for group in self.param_groups for weight in group["params"]]
        if not weights or len(set(weights)) < len(weights):
            raise ValueError(
                "Expected optimizers that step different weights, got "
                f"{'none' if not weights else 'two that step the same one'}. Pass Masking([muon, adamw], ...)."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The groups of all."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What all of them keep, by weight."""
        return {weight: state for member in self.members for weight, state in member.state.items()}

    @property
    def found_inf(self) -> Tensor | None:
        """What GradScaler has told a fused optimizer; the largest of all."""
        found = [getattr(member, "found_inf", None) for member in self.members]
        found = [value for value in found if value is not None]
        return torch.stack([value.to(found[0].device) for value in found]).max() if found else None

    def step(self, closure: Callable[..., Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step all.

        Raises:
            ValueError: for a closure, which each would evaluate, on weights that another has stepped.
        """
        if closure is not None:
            raise ValueError("Several optimizers take no closure. Call backward() first, and step() without closure.")
        for stepper in self.steppers:
            stepper.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for stepper in self.steppers:
            stepper.zero_grad(*(() if set_to_none else (False,)))

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook` before every step of each."""
        return Handles(member.register_step_pre_hook(hook) for member in self.members)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook` after every step of each; `behind` is empty when the last of them has stepped."""
        return Handles(member.register_step_post_hook(partial(self._note, hook)) for member in self.members)

    def _note(self, hook, member, args, kwargs):
        self.behind = [other for other in self.behind if other is not member]
        try:
            hook(self, args, kwargs)
        finally:
            self.behind = self.behind or list(self.members)

    def state_dict(self) -> dict[str, Any]:
        """Refuse to be saved as one: a checkpoint is to fit the optimizers of the loop."""
        raise RuntimeError("Save and load the state_dict of each of the optimizers that Masking was given.")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of."""
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
