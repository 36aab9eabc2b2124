"""What wraps an optimizer and writes weights outside its step: Lookahead, schedule-free averages, SAM.

Hooks of the optimizer inside do not see this, and many wrappers run none of their own: their methods are watched.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from sparselearning.native.zero import zero_inactive
from sparselearning.weights.closures import closure_of, masked_closure, with_closure
from sparselearning.weights.optimizer import chain_of

PERTURBING = ("first_step", "ascent_step", "perturb_weights", "perturb")  # methods of sharpness-aware minimisation


class Watched:
    """A method of one object, called through `around(method, args, kwargs)` until `remove`; copies have their own."""

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]):
        self.owner, self.name, self.method = owner, name, getattr(owner, name)
        self.own = name in vars(owner)  # an LR scheduler has patched it before
        self.removed = False

        @functools.wraps(getattr(self.method, "__func__", self.method))
        def call(caller, *args, **kwargs):
            if caller is not owner:  # a copy
                return getattr(type(caller), name)(caller, *args, **kwargs)
            return self.method(*args, **kwargs) if self.removed else around(self.method, args, kwargs)

        # LR schedulers read `step.__func__`.
        self.patch = MethodType(call, owner)
        setattr(owner, name, self.patch)

    def remove(self) -> None:
        """Let the object have its method again."""
        self.removed = True
        if vars(self.owner).get(self.name) is not self.patch:  # somebody has patched it after
            return
        if self.own:
            setattr(self.owner, self.name, self.method)
        else:
            delattr(self.owner, self.name)


def watch(masking: Any) -> list[Watched]:
    """Mask the network whenever a wrapper of its optimizer has stepped or perturbed it, and in closures of wrappers.

    Raises:
        ValueError: if a wrapper perturbs weights that keep their values.
    """

    def step(method, args, kwargs):
        masking.held.ready = False
        if (closure := closure_of((None, *args), kwargs)) is not None:
            (_, *args), kwargs = with_closure((None, *args), kwargs, masked_closure(masking, closure))
        result = method(*args, **kwargs)
        masking.held.after_step(masking.layers)
        masking.apply_mask()
        return result

    def perturb(method, args, kwargs):
        for layer in masking.layers:
            gradient, mask = masking.held.stepped_for(layer).grad, masking.held.trained_mask(layer)
            if gradient is not None and mask is not None:
                zero_inactive([gradient], [mask])
        result = method(*args, **kwargs)
        masking.apply_mask()
        return result

    watched = []
    for outer in chain_of(masking.stepper)[:-1]:
        perturbing = [name for name in PERTURBING if callable(getattr(outer, name, None))]
        if perturbing and masking.held.keeps_inactive:
            raise ValueError(
                f"weights={masking.held.kind!r} takes what is written into weights for new values, and "
                f"{type(outer).__name__}.{perturbing[0]} writes perturbed ones. Use weights='zero'."
            )
        watched += [Watched(outer, name, perturb) for name in perturbing]
        if callable(getattr(outer, "step", None)):
            watched.append(Watched(outer, "step", step))
    return watched
