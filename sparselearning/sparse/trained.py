"""Layers that train on their active weights, and hold no others: what they have in common, and linear layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparselearning.compact import COMPACT, is_compact, position_of, weight_of
from sparselearning.loading import check_compact
from sparselearning.sparse import ops
from sparselearning.sparse.derivatives import transformed
from sparselearning.sparse.entries import Entries
from sparselearning.sparse.held import Held
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.interface import DTYPES, row_shape
from sparselearning.sparse.observed import Observed


class Trained(nn.Module):
    """What a layer needs to train on the active values of its weights (`holds`, by the parameter's name).

    The optimizer steps the values. A weight stays the module's parameter, of the same shape, but holds no numbers of
    its own; see held_weight.py. Whatever the kernels cannot do (another dtype or device, function transforms, a weight
    put in its place for one call) is computed with the dense weight, whose gradient then goes to the values.

    A copy of the model without its Masking holds nothing: it is a dense layer with zeros.
    """

    plain: ClassVar[type[nn.Module]]  # the class that it was
    names: ClassVar[tuple[str, ...]] = ("weight",)  # the parameters that it multiplies with
    holds: Mapping[str, Held] = {}

    def end(self) -> None:
        """Become the dense layer again."""
        for held in list(self.holds.values()):
            held.end()
        vars(self).pop("holds", None)
        self.__class__ = self.plain  # pyright: ignore[reportAttributeAccessIssue]

    def __getstate__(self) -> dict[str, Any]:
        return {name: entry for name, entry in self.__dict__.items() if name != "holds"}

    @abstractmethod
    def as_convolution(self, shape: torch.Size) -> Any:
        """Return a weight of this shape as a convolution of one image, as the kernels take it."""

    @abstractmethod
    def belong(self, x: Tensor, dy: Tensor, shape: torch.Size) -> bool:
        """Return whether dy has the shape of the output for x and a weight of this shape; both as `watch` has them."""

    @abstractmethod
    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of |x| for each column of the weight's matrix, and that of |dy| for each row."""

    @abstractmethod
    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient of some rows of the weight's matrix, (last - first, width)."""

    @abstractmethod
    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        """Return the gradient of some entries of the weight, (entries,); rows and columns as `Entries` has them."""

    def geometry(self) -> Any:
        """Return what besides the weight says how the layer multiplies."""

    def can_multiply(self, held: Held, name: str, x: Tensor) -> bool:
        """Return whether the kernels take x and this weight; autocast turns any input into float32 for them."""
        value = held.entries.value
        return (
            isinstance(self._parameters.get(name), HeldWeight)
            and x.is_cpu
            and value.is_cpu
            and value.dtype in DTYPES
            and (x.dtype == value.dtype or (in_autocast(held) and x.is_floating_point()))
            and not transformed()
        )

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Take the weights out of the module for a while."""
        order, weights = (
            list(self._parameters),
            {name: self._parameters.pop(name) for name in self.holds if name in self._parameters},
        )
        try:
            yield
        finally:
            self._parameters = {name: weights[name] if name in weights else self._parameters[name] for name in order}

    def _apply(self, fn, recurse=True):
        if not self.holds:
            return super()._apply(fn, recurse)
        with self.set_aside():
            super()._apply(fn, recurse)
        for held in self.holds.values():  # of a tied weight in each module, as torch does; the second changes nothing
            held.apply(fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, held in self.holds.items():
            if isinstance(destination.get(key := f"{prefix}{name}"), HeldWeight) and not keep_vars:
                destination[key] = weight_of(held.entries) if COMPACT.get() else held.on_demand(destination.values())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        if self.holds:  # the weights stay the tensors that masks and optimizer know
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        given = {
            name: state_dict[f"{prefix}{name}"] for name in self.holds if is_compact(state_dict.get(prefix + name))
        }
        if not given:
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        for name, item in given.items():
            check_compact(repr(prefix + name), item, self.holds[name].shape)
        missing = [name for name in self.holds if name not in given]
        own = {key: entry for key, entry in state_dict.items() if key not in {prefix + name for name in given}}
        with self.set_aside():
            self._parameters |= {name: self.holds[name].dense for name in missing}
            try:
                super()._load_from_state_dict(own, prefix, local_metadata, *args, **kwargs)
            finally:
                for name in missing:
                    del self._parameters[name]
        for name, item in given.items():
            self.holds[name].entries.load(position_of(item), item["value"])


def in_autocast(held: Held) -> bool:
    """Return whether torch's own layer would compute in a narrower dtype; the kernels do in float32."""
    return torch.is_autocast_enabled("cpu") and held.value.dtype == torch.float32


class Single(Trained):
    """A layer that multiplies with one parameter, `weight`."""

    bias: Tensor | None

    @property
    def held(self) -> Held | None:
        """The weight, if it is held by its active values."""
        return self.holds.get("weight")

    @property
    def entries(self) -> Entries:
        return self.holds["weight"].entries

    @property
    def value(self) -> nn.Parameter:
        return self.holds["weight"].value

    @property
    def observed(self) -> Observed:
        return self.holds["weight"].observed

    @abstractmethod
    def product(self, held: Held, x: Tensor) -> Tensor:
        """Return the layer's output, computed by the kernels."""

    @abstractmethod
    def fits(self, x: Tensor) -> bool:
        """Return whether the layer takes an input of this shape; torch's own layer says what is wrong with others."""

    def has_kernel(self, x: Tensor) -> bool:
        """Return whether the kernels compute this input's output."""
        held = self.held
        return held is not None and self.can_multiply(held, "weight", x) and self.fits(x)

    def forward(self, input: Tensor) -> Tensor:
        held = self.holds.get("weight")
        if held is None or not self.can_multiply(held, "weight", input) or not self.fits(input):
            return super().forward(input)
        if not in_autocast(held):
            return self.product(held, input)
        return self.product(held, input.float()).to(torch.get_autocast_dtype("cpu"))


class Rows(Trained):
    """A layer that multiplies with weights (outputs, inputs), as nn.Linear does."""

    def as_convolution(self, shape: torch.Size):
        return row_shape(1, shape[1], shape[0])

    def belong(self, x: Tensor, dy: Tensor, shape: torch.Size) -> bool:
        return x.dim() == 2 and x.shape[1] == shape[1] and dy.shape == (len(x), shape[0])

    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs().sum(0), dy.abs().sum(0)

    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        return dy[:, first:last].t() @ x

    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        return ops.linear_weight_gradient(dy, x, start, column, False)[0]


class TrainedLinear(Single, Rows, nn.Linear):
    """nn.Linear that trains on its active weights."""

    plain = nn.Linear

    def fits(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] == self.in_features

    def product(self, held: Held, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = held.watch(rows, ops.run("linear", rows, held.value, self.bias, *held.indices(), False))
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


class TrainedProjection(TrainedLinear, NonDynamicallyQuantizableLinear):
    """The output projection of nn.MultiheadAttention that trains on its active weights."""

    plain = NonDynamicallyQuantizableLinear
