"""The dense weight of a layer whose active values are trained in its place."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter

TENSOR: Any = torch._C.TensorBase  # pyright: ignore[reportPrivateImportUsage]


class HeldWeight(nn.Parameter):
    """A parameter that stands for its active values: whoever reads it sees the weight, zeros included.

    `active` (nonzeros,) is what the optimizer steps. Gradients are those of the values, so that clipping, scaling and
    clearing the gradients of `model.parameters()` reach what is stepped. A gradient that arrives for the weight itself
    (a penalty on weights, a tied decoder, a layer that computes densely) goes to the values too.

    A copy (deepcopy, pickle) is a plain parameter.
    """

    active: nn.Parameter
    seen: int  # the version of the weight that agrees with the values
    opened: bool  # whether somebody took `.data`, whose changes no version shows

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the values, (nonzeros,)."""
        return self.active.grad

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.active.grad = gradient

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight without its history, as of any parameter."""
        self.opened = True
        return TENSOR.data.__get__(self)

    @data.setter
    def data(self, tensor: Tensor) -> None:
        self.opened = True
        TENSOR.data.__set__(self, tensor)

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the values are trained."""
        return TENSOR.requires_grad.__get__(self)

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        self.requires_grad_(trained)

    def requires_grad_(self, mode: bool = True) -> HeldWeight:
        """Train the values, or freeze them."""
        TENSOR.requires_grad.__set__(self, mode)
        self.active.requires_grad_(mode)
        return self

    @property
    def was_written(self) -> bool:
        """Whether somebody else may have written into the weight since it agreed with the values."""
        return self.opened or self._version != self.seen

    def agrees(self) -> None:
        """Note that weight and values are the same now."""
        self.seen, self.opened = self._version, False

    def register_hook(self, hook: Any) -> Any:
        """Refuse a hook that would not be called.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"A hook was to be put on a weight of shape {tuple(self.shape)}, whose active values are trained in its "
            "place (weights='sparse'); it would never be called. Put it on the `value` of the weight's module, whose "
            "gradient is (nonzeros,), or hold weights as zeros."
        )

    register_post_accumulate_grad_hook = register_hook

    def arrived(self) -> Tensor:
        """Return the gradient that arrived for the dense weight, and forget it."""
        gradient = TENSOR.grad.__get__(self)
        TENSOR.grad.__set__(self, None)
        return gradient

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Parameter:
        copied = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: int):
        return _rebuild_parameter, (self.detach(), self.requires_grad, {})


def hold(weight: Tensor, values: nn.Parameter) -> HeldWeight:
    """Make `weight` stand for `values`; it stays the same object."""
    cast(Any, weight).__class__ = HeldWeight
    held = cast(HeldWeight, weight)
    held.active = values
    held.agrees()
    return held


def let_go(weight: Tensor) -> None:
    """Make a held weight a plain parameter again."""
    if isinstance(weight, HeldWeight):
        for name in ("active", "seen", "opened"):
            delattr(weight, name)
        cast(Any, weight).__class__ = nn.Parameter
