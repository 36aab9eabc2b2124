"""The weight of a layer whose active values are trained in its place: a parameter of its shape without numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter
from torch.utils._pytree import tree_map_only

from sparselearning.sparse.entries import Entries
from sparselearning.sparse.on_demand import on_demand

TENSOR: Any = torch._C.TensorBase  # pyright: ignore[reportPrivateImportUsage]
ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class HeldWeight(nn.Parameter):
    """A parameter that stands for its active values: whoever reads it sees the weight, zeros included.

    It has shape and dtype of the weight, and no memory. Every operation on it computes the dense weight, which takes
    as much memory and time as that has entries. What is written into it, or into a view of it, goes to the values.

    Gradients are those of the values, (nonzeros,), so that clipping, scaling and clearing the gradients of
    `model.parameters()` reach what is stepped. A gradient that arrives for the weight itself (a penalty on weights, a
    tied decoder, a layer that computes densely) goes to the values too.

    A copy (deepcopy, pickle) is a plain parameter, and dense.
    """

    entries: Entries

    @staticmethod
    def __new__(cls, entries: Entries, requires_grad: bool = True):
        value = entries.value
        settings: dict[str, Any] = dict(dtype=value.dtype, device=value.device, requires_grad=requires_grad)
        self = Tensor._make_wrapper_subclass(cls, entries.shape, **settings)  # pyright: ignore[reportAttributeAccessIssue]
        self.entries = entries
        return self

    def __init__(self, entries: Entries, requires_grad: bool = True):
        pass

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.__setitem__ and isinstance(args[0], cls):
            weight = args[0].entries.dense()
            weight[args[1]] = args[2]
            return args[0].entries.write(weight)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in ALIASES:
            return cls(args[0].entries, False)
        kwargs, dense = kwargs or {}, {}

        def plain(held):
            entries = held.entries
            return dense.setdefault(id(entries), (entries, entries.dense()))[1]

        result = func(*tree_map_only(cls, plain, args), **tree_map_only(cls, plain, kwargs))
        written = [held for held in _written(func, args, kwargs) if isinstance(held, cls)]
        for held in written:
            held.entries.write(dense[id(held.entries)][1])
        if written:
            return written[0] if isinstance(result, Tensor) else result
        if func.is_view and isinstance(result, Tensor) and isinstance(args[0], cls):
            entries = args[0].entries
            return on_demand(result, entries.write, dense[id(entries)][1])
        return result

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the values, (nonzeros,)."""
        return self.entries.value.grad

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.entries.value.grad = gradient

    @property
    def active(self) -> nn.Parameter:
        """The active values, (nonzeros,)."""
        return self.entries.value

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight without its history, as of any parameter; what is written into it counts."""
        return TENSOR.data.__get__(self)

    @data.setter
    def data(self, tensor: Tensor) -> None:
        if tensor.shape != self.shape:
            raise ValueError(f"Expected data of shape {tuple(self.shape)}, got {tuple(tensor.shape)}.")
        self.entries.write(tensor)

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
        self.entries.value.requires_grad_(mode)
        return self

    def register_hook(self, hook: Any) -> Any:
        """Refuse a hook that would not be called.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"A hook was to be put on a weight of shape {tuple(self.shape)}, whose active values are trained in its "
            "place (weights='sparse'); it would never be called. Put it on `weight.entries.value`, whose gradient is "
            "(nonzeros,), or hold weights as zeros."
        )

    register_post_accumulate_grad_hook = register_hook

    def arrived(self) -> Tensor:
        """Return the gradient that arrived for the dense weight, and forget it."""
        gradient = TENSOR.grad.__get__(self)
        TENSOR.grad.__set__(self, None)
        return gradient

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Parameter:
        copied = nn.Parameter(self.entries.dense(), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any):
        return _rebuild_parameter, (self.entries.dense(), self.requires_grad, {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"HeldWeight(shape={tuple(self.shape)}, active={len(self.entries.value)}, dtype={self.dtype})"


def _written(func, args, kwargs):
    """Yield the arguments that an operator writes."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, list | tuple) else [given]
