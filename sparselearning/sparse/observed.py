"""The gradients of a dense weight, as the steps of its active values used them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.layers import SparseLayer
from sparselearning.loading import MOST_STEPS, check_entries, check_tensor, check_whole, describe, refuse


class ObservedGradient:
    """The sum of a weight's dense gradients over the last `window` observed steps.

    A backward pass hands over what it computed (`collect`), and says that the values' gradient has been accumulated
    (`commit`); a step takes the sum of its passes, changed as the gradient of the values was changed in between: scaled
    back, clipped (`take`). A pass whose gradients were cleared instead, or went elsewhere, does not count.
    """

    def __init__(self, values: nn.Parameter, window: int, observing: bool):
        self.values, self.window, self.observing = values, window, observing
        self.sum: Tensor | None = None
        self.steps = 0  # that `sum` is of
        self.pending: Tensor | None = None  # of the passes since the values' gradient was cleared
        self.passing: Tensor | None = None  # of the pass that runs
        self.task = -1  # the pass that `passing` is of

    def collect(self, gradient: Tensor) -> None:
        """Add a part of the gradient of the backward pass that runs."""
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateImportUsage]
        if task != self.task:
            self.task, self.passing = task, None
            if self.values.grad is None or not self.values.grad.any():
                self.pending = None
        self.passing = plus(self.passing, gradient)

    def commit(self) -> None:
        """Count what was collected in this pass: the values have received their gradient."""
        if self.passing is not None:
            self.pending, self.passing = plus(self.pending, self.passing), None

    def take(self, position: Tensor, scale: float = 1.0) -> None:
        """Count a step, which takes the pending gradients; `scale` is what the optimizer multiplies gradients with."""
        pending, self.pending = self.pending, None
        if pending is None or self.values.grad is None:
            return
        used = as_stepped(pending, pending.flatten()[position], self.values.grad)
        if used is None:
            return
        used = used if scale == 1 else used.mul_(scale)
        if self.window == 1:  # of the last step alone
            self.sum, self.steps = used, 1
            return
        self.sum, self.steps = plus(self.sum, used), self.steps + 1
        if self.steps > self.window:  # the earlier ones fade, as they do from a momentum
            self.sum.mul_(self.window / self.steps)
            self.steps = self.window

    def mean(self) -> Tensor | None:
        """Return the mean gradient of the observed steps, or None if there were none."""
        return None if self.sum is None else self.sum / self.steps

    def forget(self) -> None:
        """Start anew after an update of the masks."""
        self.sum, self.steps = None, 0
        self.drop()

    def drop(self) -> None:
        """Forget the passes since the last step."""
        self.pending = self.passing = None

    def state_dict(self) -> dict[str, Any]:
        """Return what is to be saved between two steps."""
        return {"gradient": self.sum, "observed": self.steps, "observing": self.observing}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take what `state_dict` returned; an empty state stands for no observed gradients."""
        self.forget()
        gradient = state.get("gradient")
        self.sum = None if gradient is None else gradient.to(device, copy=True)
        self.steps, self.observing = state.get("observed", 0), state.get("observing", self.observing)


def check_observed(layer: SparseLayer, state: Any) -> None:
    """Check a saved state of the observed gradient of a layer's weight.

    Raises:
        RuntimeError: if it is none.
    """
    entry = f"'sparse_training'['layers'][{layer.name!r}]"
    check_entries(entry, state, (), ("gradient", "observed", "observing"))
    seen = state.get("gradient") is not None
    if seen:
        check_tensor(f"{entry}['gradient']", state["gradient"], layer.mask.shape, "floating")
    check_whole(f"{entry}['observed']", state.get("observed", 0), int(seen), MOST_STEPS if seen else 0)
    if not isinstance(state.get("observing", True), bool):
        refuse(f"{entry}['observing']", "True or False", describe(state["observing"]))


def plus(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum, in place of `total` if there is one."""
    return part if total is None else total.add_(part)


def as_stepped(dense: Tensor, before: Tensor, after: Tensor) -> Tensor | None:
    """Return a dense gradient, in place, changed as its active part was: from `before` to `after`, both (nonzeros,).

    The change may be a factor (a loss scale, the clipping of a norm) or the clipping of each entry. Of any other the
    factor that comes closest is taken. None: the two are not finite, or have nothing in common. Equal means up to
    rounding, for torch computes the dense gradient and the kernels that of the values.
    """
    factor = (before.double() @ after.double()) / before.double().square().sum()
    if not factor.isfinite():
        return None if before.any() else dense
    bound = after.abs().max()
    if not is_close(before * factor, after) and is_close(before.clamp(-bound, bound), after):
        return dense.clamp_(-bound, bound)
    if abs(factor - 1) < 1e-5:
        return dense
    return dense.mul_(factor.item()) if factor != 0 else None


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two vectors are equal up to rounding."""
    return bool((found - expected).norm() <= 1e-4 * expected.norm())
