"""Sparse weights for the tests, and the operators called with them."""

import torch

from sparselearning.sparse import ops
from sparselearning.sparse.interface import available, conv_shape, kernels, row_shape


def sparse_weight(shape, density, dtype=torch.float32):
    weight = torch.randn(shape, dtype=dtype)
    return weight * (torch.rand(shape) < density)


def rows_of(weight):
    """Return (value, start, column) of the nonzeros of `weight`."""
    flat = weight.detach().flatten(1)
    active = flat != 0
    start = torch.nn.functional.pad(active.sum(1).cumsum(0), (1, 0)).int()
    return flat[active].clone(), start, active.nonzero()[:, 1].int()


def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, relu=False):
    """Return (y, value): the sparse convolution and the leaf tensor of its values."""
    value, start, column = rows_of(weight)
    kernel = tuple(weight.shape[2:])
    geometry = (kernel, stride, padding, dilation, groups)
    shape, _, _ = conv_shape(1, x.shape[1], *kernel, len(weight), *geometry, False)
    turned = ops.transposed(start, column, shape)
    value.requires_grad_()
    return torch.ops.sparselearning.conv2d(x, value, bias, start, column, *turned, *geometry, relu), value


def linear(x, weight, bias=None, relu=False):
    """Return (y, value): the sparse linear layer and the leaf tensor of its values."""
    value, start, column = rows_of(weight)
    turned = ops.transposed(start, column, row_shape(1, *weight.shape[::-1]))
    value.requires_grad_()
    return torch.ops.sparselearning.linear(x, value, bias, start, column, *turned, relu), value


def instruction_sets():
    return range(kernels().best + 1) if available() else (0,)
