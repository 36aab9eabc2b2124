"""Derivatives of sparse layers by torch's own operations on the dense weight.

They are for what the kernels have no formula of: gradients of gradients, forward derivatives and `torch.func`. They
are exact, and as slow as dense layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparselearning.compact import positions

levels = torch._C._functorch.get_dynamic_layer_stack_depth  # pyright: ignore[reportAttributeAccessIssue]


def transformed() -> bool:
    """Return whether torch.func transforms the running call (grad, vmap, jacrev, jvp), or forward derivatives do."""
    return forward_ad._current_level >= 0 or levels() > 0


def dense_weight(value: Tensor, start: Tensor, column: Tensor, shape: torch.Size) -> Tensor:
    """Return a weight with its zeros, differentiable in `value`."""
    flat = positions(start, column, shape[1:].numel())
    return value.new_zeros(shape.numel()).scatter(0, flat, value).reshape(shape)


def linear_gradients(dy: Tensor, x: Tensor, value: Tensor, start: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a linear layer's input and values, differentiable in dy, x and value."""
    shape = torch.Size((len(start) - 1, x.shape[1]))
    weight_gradient = dy.t() @ x
    return dy @ dense_weight(value, start, column, shape), weight_gradient.flatten()[positions(start, column, shape[1])]


def conv2d_gradients(
    dy: Tensor, x: Tensor, value: Tensor, start: Tensor, column: Tensor, *geometry
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a convolution's input and values, differentiable in dy, x and value."""
    kernel, stride, padding, dilation, groups = geometry
    shape = torch.Size((len(start) - 1, x.shape[1] // groups, *kernel))
    weight = dense_weight(value, start, column, shape)
    settings = (None, stride, padding, dilation, False, (0, 0), groups, (True, True, False))
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, *settings)
    return dx, dweight.flatten()[positions(start, column, shape[1:].numel())]


def columns_gradients(dy: Tensor, x: Tensor, value: Tensor, start: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the values of W (inputs, outputs), of y = x W; differentiable in all three."""
    shape = torch.Size((len(start) - 1, dy.shape[1]))
    weight_gradient = x.t() @ dy
    flat = positions(start, column, shape[1])
    return dy @ dense_weight(value, start, column, shape).t(), weight_gradient.flatten()[flat]
