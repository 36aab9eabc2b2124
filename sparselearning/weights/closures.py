"""Closures: an optimizer that computes the loss itself sees the masked network, in every evaluation."""

import functools
from collections.abc import Callable
from typing import Any

from sparselearning.weights.frozen import note_gradients


def closure_of(args: tuple, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the closure among the arguments of an optimizer's step, of which the first is the optimizer."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure if callable(closure) else None


def with_closure(args: tuple, kwargs: dict[str, Any], closure: Callable[..., Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of an optimizer's step with another closure."""
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}


def masked_closure(masking: Any, closure: Callable[..., Any]) -> Callable[..., Any]:
    """Return a closure that masks the network before it computes the loss, and sees the gradients after it.

    A closure that this Masking has masked stays as it is: wrappers of optimizers hand theirs on to the one inside.
    """
    masked_by = getattr(closure, "masked_by", ())
    if any(other is masking for other in masked_by):
        return closure

    @functools.wraps(closure)
    def evaluate(*args, **kwargs):
        masking.held.before_evaluation(masking.layers)
        loss = closure(*args, **kwargs)
        note_gradients(masking)
        masking.held.after_evaluation(masking.layers)
        return loss

    vars(evaluate)["masked_by"] = (*masked_by, masking)
    return evaluate
