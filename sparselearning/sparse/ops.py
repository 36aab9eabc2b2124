"""Sparse convolution and linear layers as operators of torch, on a CPU.

A weight of shape (out_channels, in_channels / groups, height, width) is stored by its nonzeros, row by row:
`value` (float), `column` (int32, position in the flattened row) and `start` (int32, out_channels + 1 entries).
`t_start`, `t_column`, `t_order` are the same nonzeros in the order of the input gradient; `transposed` makes them.

Activations are NCHW by shape. From some batch size on (`is_batch_last`) their memory is ordered CHWN, so that one
vector holds one pixel of several images; elementwise operations of torch keep that order, others give plain NCHW,
which the next sparse layer turns while it reads.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from sparselearning.sparse.library import DTYPES, conv_shape, kernels

LANES = 16  # images in a vector of the widest instruction set; one rule for all of them
WIDE = 4  # pixels of a row that kernels turn at once
FEW = 4  # up to this many rows a linear layer takes one at a time

library = torch.library.Library("sparselearning", "DEF")
INDICES = "Tensor start, Tensor column"
TRANSPOSED = "Tensor t_start, Tensor t_column, Tensor t_order"
GEOMETRY = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
library.define(
    f"conv2d(Tensor x, Tensor value, Tensor? bias, {INDICES}, {TRANSPOSED}, {GEOMETRY}, bool relu) -> Tensor"
)
library.define(
    f"conv2d_input_gradient(Tensor dy, Tensor value, {TRANSPOSED}, SymInt[] input_shape, {GEOMETRY}) -> Tensor"
)
library.define(f"conv2d_weight_gradient(Tensor dy, Tensor x, {INDICES}, {GEOMETRY}) -> Tensor")
library.define(f"linear(Tensor x, Tensor value, Tensor? bias, {INDICES}, {TRANSPOSED}, bool relu) -> Tensor")
library.define(f"linear_input_gradient(Tensor dy, Tensor value, {TRANSPOSED}) -> Tensor")
library.define(f"linear_weight_gradient(Tensor dy, Tensor x, {INDICES}) -> Tensor")
library.define("affine(Tensor x, Tensor scale, Tensor shift, bool relu) -> Tensor")


def is_batch_last(batch: int) -> bool:
    """Return whether activations of this many images are kept with the batch last in memory."""
    return batch >= LANES and -(-batch // LANES) * LANES * 5 <= batch * 7


def is_turned(x: Tensor) -> bool:
    """Return whether the batch is the last dimension of x in memory (and not the only one)."""
    return not x.is_contiguous() and x.movedim(0, -1).is_contiguous()


def to_batch_last(x: Tensor) -> Tensor:
    """Return x, of shape (N, ...), with the memory order (..., N)."""
    if x.movedim(0, -1).is_contiguous():
        return x
    x = x.contiguous()
    turned = new_output(x, x.shape, True)
    kernels().call("transpose", x.dtype, x, x.shape[0], x[0].numel() if len(x) else 0, turned)
    return turned


def to_batch_first(x: Tensor) -> Tensor:
    """Return x with its dimensions in memory as in its shape."""
    if not is_turned(x):
        return x.contiguous()
    plain = x.new_empty(x.shape)
    kernels().call("transpose", x.dtype, x, x[0].numel(), x.shape[0], plain)
    return plain


def in_order(x: Tensor, batch_last: bool) -> Tensor:
    return to_batch_last(x) if batch_last else to_batch_first(x)


def readable(x: Tensor, batch_last: bool, step: int = 1) -> tuple[Tensor, bool]:
    """Return x in a memory order that kernels read, and whether that is NCHW where they go along the batch.

    They turn such images while they read them, where they read neighbouring pixels.
    """
    if not batch_last or is_turned(x) or step > 1 or x.shape[-1] < WIDE:
        return in_order(x, batch_last), False
    return x.contiguous(), True


def new_output(x: Tensor, shape, batch_last: bool) -> Tensor:
    """Return an empty tensor like x; not a view of one, for views must not be changed in place under autograd."""
    if not batch_last:
        return x.new_empty(shape)
    strides = [shape[0]]
    for size in reversed(shape[2:]):
        strides.insert(0, strides[0] * size)
    return x.new_empty_strided(shape, (1, *strides))


def check(x: Tensor, value: Tensor, start: Tensor, column: Tensor) -> None:
    if x.dtype not in DTYPES or x.dtype != value.dtype:
        raise TypeError(
            f"Sparse layers compute in float32 or float64, input and values alike; got {x.dtype} and {value.dtype}."
        )
    if start.dtype != torch.int32 or column.dtype != torch.int32 or column.shape != value.shape:
        raise ValueError("A sparse layer needs int32 indices, one column for each value.")


def conv2d(x, value, bias, start, column, t_start, t_column, t_order, *rest):
    *geometry, relu = rest
    check(x, value, start, column)
    batch_last = is_batch_last(len(x))
    x, x_first = readable(x, batch_last, geometry[1][1])
    out_channels = len(start) - 1
    shape, height, width = describe(x.shape, out_channels, geometry, batch_last, (x_first, False))
    y = new_output(x, (len(x), out_channels, height, width), batch_last)
    bias = None if bias is None else bias.contiguous()
    values = value.contiguous()
    kernels().call("forward", x.dtype, shape, x, start, column, values, bias, relu, y)
    return y


def describe(input_shape, out_channels, geometry, batch_last, first):
    kernel, stride, padding, dilation, groups = geometry
    batch, channels, height, width = input_shape
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return conv_shape(batch, channels, height, width, out_channels, *pairs, groups, batch_last, first)


def conv2d_input_gradient(dy, value, t_start, t_column, t_order, input_shape, *geometry):
    batch_last = is_batch_last(len(dy))
    dy, y_first = readable(dy, batch_last)
    shape, _, _ = describe(input_shape, dy.shape[1], geometry, batch_last, (False, y_first))
    dx = new_output(dy, tuple(input_shape), batch_last)
    values = value.contiguous()
    kernels().call("input_gradient", dy.dtype, shape, dy, t_start, t_column, t_order, values, dx)
    return dx


def conv2d_weight_gradient(dy, x, start, column, *geometry):
    batch_last = is_batch_last(len(dy))
    (dy, y_first), (x, x_first) = readable(dy, batch_last), readable(x, batch_last, geometry[1][1])
    shape, _, _ = describe(x.shape, dy.shape[1], geometry, batch_last, (x_first, y_first))
    gradient = dy.new_empty(len(column))
    kernels().call("weight_gradient", dy.dtype, shape, x, dy, start, column, gradient)
    return gradient


def linear(x, value, bias, start, column, t_start, t_column, t_order, relu):
    check(x, value, start, column)
    batch, features = x.shape
    outputs = len(start) - 1
    values = value.contiguous()
    bias = None if bias is None else bias.contiguous()
    if batch <= FEW:
        x, y = x.contiguous(), x.new_empty(batch, outputs)
        kernels().call("few", x.dtype, x, batch, features, outputs, start, column, values, bias, relu, y)
        return y
    x, y = to_batch_last(x), new_output(x, (batch, outputs), True)
    kernels().call("forward", x.dtype, row_shape(batch, features, outputs), x, start, column, values, bias, relu, y)
    return in_batch_order(y)


def row_shape(batch, features, outputs):
    """Return a linear layer as a 1x1 convolution of one image, one pixel high and as wide as the batch."""
    one, zero = (1, 1), (0, 0)
    return conv_shape(1, features, 1, batch, outputs, one, one, zero, one, 1, False)[0]


def in_batch_order(y: Tensor) -> Tensor:
    return y if is_batch_last(len(y)) else to_batch_first(y)


def linear_input_gradient(dy, value, t_start, t_column, t_order):
    batch, outputs = dy.shape
    features = len(t_start) - 1
    dy, dx = to_batch_last(dy), new_output(dy, (batch, features), True)
    shape = row_shape(batch, features, outputs)
    values = value.contiguous()
    kernels().call("input_gradient", dy.dtype, shape, dy, t_start, t_column, t_order, values, dx)
    return in_batch_order(dx)


def linear_weight_gradient(dy, x, start, column):
    dy, x = to_batch_last(dy), to_batch_last(x)
    gradient = dy.new_empty(len(column))
    shape = row_shape(len(x), x.shape[1], dy.shape[1])
    kernels().call("weight_gradient", dy.dtype, shape, x, dy, start, column, gradient)
    return gradient


def affine(x, scale, shift, relu):
    """Return x * scale + shift per channel, rectified if asked for, in the memory order of x."""
    turned = is_turned(x)
    x = x if turned else x.contiguous()
    y = new_output(x, x.shape, turned)
    pixels = x[0, 0].numel() if x.numel() else 0
    outer, inner = (1, pixels * len(x)) if turned else (len(x), pixels)
    kernels().call("affine", x.dtype, x, outer, x.shape[1], inner, scale.contiguous(), shift.contiguous(), relu, y)
    return y


def fake_affine(x, scale, shift, relu):
    return new_output(x, x.shape, is_turned(x))


def fake_conv2d(x, value, bias, start, column, t_start, t_column, t_order, *rest):
    kernel, stride, padding, dilation, _, _ = rest
    size = (
        (size + 2 * pad - step * (k - 1) - 1) // move + 1
        for size, k, move, pad, step in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    return new_output(x, (x.shape[0], start.shape[0] - 1, *size), is_batch_last(x.shape[0]))


def fake_input_gradient(dy, value, t_start, t_column, t_order, input_shape, *geometry):
    return new_output(dy, tuple(input_shape), is_batch_last(dy.shape[0]))


def fake_linear(x, value, bias, start, column, t_start, t_column, t_order, relu):
    return new_output(x, (x.shape[0], start.shape[0] - 1), is_batch_last(x.shape[0]))


def fake_linear_input_gradient(dy, value, t_start, t_column, t_order):
    return new_output(dy, (dy.shape[0], t_start.shape[0] - 1), is_batch_last(dy.shape[0]))


def fake_weight_gradient(dy, x, start, column, *geometry):
    return dy.new_empty(column.shape)


def run(name: str, x: Tensor, *arguments) -> Tensor:
    """Call an operator on x; where nothing records or traces it, its kernel alone, which saves some 40 us."""
    observed = torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing()
    direct = type(x) is Tensor and not observed
    return KERNELS[name](x, *arguments) if direct else getattr(torch.ops.sparselearning, name)(x, *arguments)


def save_for_backward(ctx, inputs, output):
    x, value, bias, start, column, t_start, t_column, t_order, *ctx.geometry, relu = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, value, start, column, t_start, t_column, t_order, output if relu else None)


def gradients(ctx, dy, input_gradient, weight_gradient):
    """Return the gradients of an operator's arguments: x, value, bias, and None for the rest."""
    x, value, start, column, t_start, t_column, t_order, output = ctx.saved_tensors
    if output is not None:
        dy = dy * (output > 0)
    needs_x, needs_value, needs_bias, *others = ctx.needs_input_grad
    dx = input_gradient(dy, value, t_start, t_column, t_order) if needs_x else None
    dvalue = weight_gradient(dy, x, start, column) if needs_value else None
    dbias = dy.flatten(2).sum((0, 2)) if needs_bias and dy.dim() == 4 else dy.sum(0) if needs_bias else None
    return dx, dvalue, dbias, *(None for _ in others)


def conv2d_backward(ctx, dy):
    shape = ctx.saved_tensors[0].shape
    return gradients(
        ctx,
        dy,
        lambda dy, *rest: run("conv2d_input_gradient", dy, *rest, shape, *ctx.geometry),
        lambda dy, *rest: run("conv2d_weight_gradient", dy, *rest, *ctx.geometry),
    )


def linear_backward(ctx, dy):
    return gradients(ctx, dy, partial(run, "linear_input_gradient"), partial(run, "linear_weight_gradient"))


def save_affine(ctx, inputs, output):
    _, scale, _, relu = inputs
    ctx.save_for_backward(scale, output if relu else None)


def affine_backward(ctx, dy):
    """Statistics and weights of a folded norm are fixed: only x has a gradient."""
    scale, output = ctx.saved_tensors
    if output is not None:
        dy = dy * (output > 0)
    return dy * scale.reshape(-1, *(1 for _ in dy.shape[2:])), None, None, None


KERNELS = {}


def register(name, kernel, fake, backward=None, save=save_for_backward):
    KERNELS[name] = kernel
    library.impl(name, kernel, "CPU")
    torch.library.register_fake(f"sparselearning::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"sparselearning::{name}", backward, setup_context=save, lib=library)


register("conv2d", conv2d, fake_conv2d, conv2d_backward)
register("conv2d_input_gradient", conv2d_input_gradient, fake_input_gradient)
register("conv2d_weight_gradient", conv2d_weight_gradient, fake_weight_gradient)
register("linear", linear, fake_linear, linear_backward)
register("linear_input_gradient", linear_input_gradient, fake_linear_input_gradient)
register("linear_weight_gradient", linear_weight_gradient, fake_weight_gradient)
register("affine", affine, fake_affine, affine_backward, save_affine)


def transposed(start: Tensor, column: Tensor, shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t_start, t_column, t_order) of a convolution described by `library.conv_shape`."""
    channels, strides = shape[1], shape[9] * shape[10]
    return kernels().transpose_rows(shape, start, column, channels * strides)
