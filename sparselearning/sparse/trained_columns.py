"""Linear layers with a weight (inputs, outputs) that train on their active weights: Conv1D of transformers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from sparselearning.sparse import ops
from sparselearning.sparse.derivatives import columns_gradients
from sparselearning.sparse.dispatch import KERNELS, is_plain, unobserved
from sparselearning.sparse.held import Held
from sparselearning.sparse.interface import row_shape
from sparselearning.sparse.trained import Single


class ColumnsProduct(torch.autograd.Function):
    """y = x W + b, for x (batch, inputs) and the values of W (inputs, outputs); `indices` as `Held.indices`.

    To a linear layer with the weight W, x is the gradient of an output and y that of the input. Hence y comes from the
    kernel of input gradients, the gradient of x from that of the forward pass, and that of the values from the kernel
    of weight gradients with x and dy exchanged. Gradients are exact, and differentiable again.
    """

    @staticmethod
    def forward(ctx, x, value, bias, *indices):  # pyright: ignore[reportIncompatibleMethodOverride]
        y = KERNELS["linear_input_gradient"](x, value, *indices[2:])
        ctx.save_for_backward(x, value, *indices)
        return y if bias is None else y.add_(bias.detach())

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, value, *indices = ctx.saved_tensors
        needs_x, needs_value, needs_bias, *others = ctx.needs_input_grad
        start, column, *_ = indices
        dx = dvalue = None
        if not unobserved(dy):
            dx, dvalue = columns_gradients(dy, x, value, start, column)
        else:
            if needs_x:
                dx = KERNELS["linear"](dy, value, None, *indices, False)
            if needs_value:
                dvalue = KERNELS["linear_weight_gradient"](x, dy, start, column, False)[0]
        return dx, dvalue, dy.sum(0) if needs_bias else None, *(None for _ in others)


class Columns(Single):
    """A layer that multiplies with a weight (inputs, outputs), of which the active values are trained."""

    weight: Tensor

    def as_convolution(self, shape: torch.Size):
        return row_shape(1, shape[1], shape[0])

    def fits(self, x: Tensor) -> bool:
        return is_plain(x) and x.dim() > 0 and x.shape[-1] == self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x)

    def product(self, held: Held, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = ColumnsProduct.apply(rows, held.value, self.bias, *held.indices())  # pyright: ignore[reportAssignmentType]
        return held.watch(rows, y).reshape(*x.shape[:-1], y.shape[-1])

    def belong(self, x: Tensor, dy: Tensor, shape: torch.Size) -> bool:
        return x.dim() == 2 and x.shape[1] == shape[0] and dy.shape == (len(x), shape[1])

    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of |dy| for each column of the weight's matrix, and that of |x| for each row."""
        return dy.abs().sum(0), x.abs().sum(0)

    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        return x[:, first:last].t() @ dy

    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        return ops.linear_weight_gradient(x, dy, start, column, False)[0]

    def __reduce_ex__(self, protocol):
        return empty_columns, (self.plain,), self.__getstate__()


@functools.cache
def columns_of(kind: type[nn.Module]) -> type[Columns]:
    """Return the class of layers that are a `kind`, whose weight is (inputs, outputs), and train active weights."""
    return type(f"Trained{kind.__name__}", (Columns, kind), {"plain": kind, "__module__": __name__})  # pyright: ignore[reportGeneralTypeIssues]


def empty_columns(kind: type[nn.Module]) -> Columns:
    """Return a layer without parameters or attributes, for a copy to fill."""
    layer = columns_of(kind)
    return layer.__new__(layer)
