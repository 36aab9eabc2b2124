"""The operators without their numbers: what torch.compile, torch.export and meta tensors see of them."""

from __future__ import annotations

import torch

from sparselearning.sparse.arguments import (
    check_affine,
    check_geometry,
    check_images,
    check_rows,
    check_shape,
    check_tensors,
    output_shape,
)
from sparselearning.sparse.memory_order import is_batch_last, is_turned, new_output


def conv2d(x, *rest):
    return new_output(x, shape_of_conv2d(x, *rest), is_batch_last(x.shape[0]))


def conv2d_plain(x, *rest):
    return x.new_empty(shape_of_conv2d(x, *rest))


def shape_of_conv2d(x, value, bias, start, column, t_start, t_column, t_order, *rest):
    """Return the shape of a convolution's output, after the checks of what it is given."""
    *geometry, _ = rest
    check_tensors(x, value, bias, (start, t_start), (column, t_column, t_order))
    check_images(x)
    return output_shape(x.shape, start.shape[0] - 1, t_start.shape[0] - 1, geometry)


def conv2d_input_gradient(dy, value, t_start, t_column, t_order, input_shape, *geometry):
    check_tensors(dy, value, None, (t_start,), (t_column, t_order))
    check_images(dy)
    check_shape("dy", dy, output_shape(input_shape, dy.shape[1], t_start.shape[0] - 1, geometry))
    return new_output(dy, tuple(input_shape), is_batch_last(dy.shape[0]))


def conv2d_weight_gradient(dy, x, start, column, *rest):
    *geometry, bias = rest
    check_tensors(dy, None, None, (start,), (column,), x)
    check_images(x)
    check_geometry(*geometry)
    stride = geometry[1]
    planes = x.shape[1] * stride[0] * stride[1]
    check_shape("dy", dy, output_shape(x.shape, start.shape[0] - 1, planes, geometry))
    return dy.new_empty(column.shape), dy.new_empty(start.shape[0] - 1 if bias else 0)


def transpose(start, column, planes, *geometry):
    return start.new_empty(planes + 1), torch.empty_like(column), torch.empty_like(column)


def linear(x, value, bias, start, column, t_start, t_column, t_order, relu):
    check_tensors(x, value, bias, (start, t_start), (column, t_column, t_order))
    check_rows(x, t_start.shape[0] - 1, start.shape[0] - 1)
    return x.new_empty(x.shape[0], start.shape[0] - 1)


def linear_input_gradient(dy, value, t_start, t_column, t_order):
    check_tensors(dy, value, None, (t_start,), (t_column, t_order))
    check_rows(dy)
    return dy.new_empty(dy.shape[0], t_start.shape[0] - 1)


def linear_weight_gradient(dy, x, start, column, bias):
    check_tensors(dy, None, None, (start,), (column,), x)
    check_rows(x)
    check_shape("dy", dy, (x.shape[0], start.shape[0] - 1))
    return dy.new_empty(column.shape), dy.new_empty(start.shape[0] - 1 if bias else 0)


def affine(x, scale, shift, relu):
    check_affine(x, scale, shift)
    return new_output(x, x.shape, is_turned(x))
