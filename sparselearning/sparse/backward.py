"""The gradients of the operators, as torch.library registers them."""

from __future__ import annotations

from functools import partial

import torch

from sparselearning.sparse.arguments import are_left_out
from sparselearning.sparse.derivatives import conv2d_gradients, linear_gradients, transformed
from sparselearning.sparse.dispatch import run, unobserved
from sparselearning.sparse.memory_order import is_batch_last, readable, to_batch_last

POINTWISE = (1, 1), (1, 1), (0, 0), (1, 1), 1  # the geometry of a linear layer


def save_for_backward(ctx, inputs, output):
    x, value, _, start, column, t_start, t_column, t_order, *ctx.geometry, relu = inputs
    ctx.input_shape = x.shape  # saved tensors may be read only once (torch.utils.checkpoint)
    ctx.save_for_backward(x, value, start, column, t_start, t_column, t_order, output if relu else None)


def gradients(ctx, dy, input_gradient, weight_gradient, turn, exact):
    """Return the gradients of an operator's arguments: x, value, bias, and None for the rest.

    Where a layer has no turned indices (SparseModule.serve), `turn` makes them.

    Where gradients of these gradients may follow (create_graph), or many are computed at once (is_grads_batched),
    `exact` gives them from the dense weight.
    """
    x, value, start, column, t_start, t_column, t_order, output = ctx.saved_tensors
    if output is not None:
        dy = dy * (output > 0)
    needs_x, needs_value, needs_bias, *others = ctx.needs_input_grad
    if (torch.is_grad_enabled() and not torch.compiler.is_compiling()) or transformed():
        dx, dvalue = exact(dy, x, value, start, column)
        dbias = bias_gradient(dy) if needs_bias else None
    else:
        if unobserved(dy) and needs_value:  # once for both gradients
            dy = to_batch_last(dy) if dy.dim() == 2 else readable(dy, is_batch_last(dy.shape[0]))[0]
        if needs_x and are_left_out(column, t_column, t_order):
            t_start, t_column, t_order = turn(start, column, t_start.shape[0] - 1)
        dx = input_gradient(dy, value, t_start, t_column, t_order) if needs_x else None
        if needs_value:
            dvalue, summed = weight_gradient(dy, x, start, column, needs_bias)
            dbias = summed if needs_bias else None
        else:
            dvalue, dbias = None, bias_gradient(dy) if needs_bias else None
    return dx, dvalue, dbias, *(None for _ in others)


def bias_gradient(dy):
    """Return the sums of dy over all but the outputs."""
    return dy.flatten(2).sum((0, 2)) if dy.dim() == 4 else dy.sum(0)


def conv2d_backward(ctx, dy):
    return gradients(
        ctx,
        dy,
        lambda dy, *rest: run("conv2d_input_gradient", dy, *rest, ctx.input_shape, *ctx.geometry),
        lambda dy, x, start, column, bias: run("conv2d_weight_gradient", dy, x, start, column, *ctx.geometry, bias),
        lambda *indices: run("transpose", *indices, *ctx.geometry),
        lambda *tensors: conv2d_gradients(*tensors, *ctx.geometry),
    )


def linear_backward(ctx, dy):
    kernels = partial(run, "linear_input_gradient"), partial(run, "linear_weight_gradient")
    return gradients(ctx, dy, *kernels, lambda *indices: run("transpose", *indices, *POINTWISE), linear_gradients)


def refuse_backward(ctx, *gradients):
    raise RuntimeError(
        "The gradient operators of sparse layers have no derivatives of their own. Differentiate the layer with "
        "create_graph=True, which takes its dense weight."
    )


def save_nothing(ctx, inputs, output):
    pass


def save_affine(ctx, inputs, output):
    x, scale, shift, relu = inputs
    constant = not (scale.requires_grad or shift.requires_grad)  # of fixed statistics and weights
    ctx.save_for_backward(None if constant else x, scale, output if relu else None)


def affine_backward(ctx, dy):
    """Return the gradients of x, scale and shift."""
    x, scale, output = ctx.saved_tensors
    if output is not None:
        dy = dy * (output > 0)
    others = [d for d in range(dy.dim()) if d != 1]
    dscale = (dy * x).sum(others) if ctx.needs_input_grad[1] else None
    dshift = dy.sum(others) if ctx.needs_input_grad[2] else None
    return dy * scale.reshape(-1, *(1 for _ in dy.shape[2:])), dscale, dshift, None
