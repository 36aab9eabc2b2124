"""Batch normalisation of activations whose batch is last in memory, by the statistics of the batch.

torch's own is made for channels that are first or last in memory; on a channel whose numbers lie side by side it is
four times slower than memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.sparse.dispatch import is_plain, unobserved
from sparselearning.sparse.interface import DTYPES, available, call


class Normalisation(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, of each channel of x (N, C, H, W) in CHWN order.

    Returns it with the mean and the variance (biased), both (C,). Gradients are exact, and differentiable again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):  # pyright: ignore
        y, mean, variance = torch.empty_like(x), *x.new_empty(2, x.shape[1])
        call("normalise", y, x=x, scale=weight, shift=bias, mean=mean, variance=variance, **sizes(x, eps))
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx, dy: Tensor, *_):  # pyright: ignore
        x, weight, bias, mean, variance = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if not unobserved(dy):
            given = [tensor for tensor, need in zip((x, weight, bias), needed, strict=True) if need]
            with torch.enable_grad():
                y = F.batch_norm(x, None, None, weight, bias, True, 0, ctx.eps)
                found = iter(torch.autograd.grad(y, given, dy, create_graph=True))
            return *(next(found) if need else None for need in needed), None
        dx, dscale, dshift = torch.empty_like(x), *x.new_empty(2, x.shape[1])
        results = dict(dscale=dscale, dshift=dshift)
        in_order = torch.empty_like(x).copy_(dy) if dy.stride() != x.stride() else dy
        statistics = dict(mean=mean, variance=variance)
        call("normalise_gradient", dx, x=x, dy=in_order, scale=weight, **statistics, **results, **sizes(x, ctx.eps))
        return *(result if need else None for result, need in zip((dx, dscale, dshift), needed, strict=True)), None


def sizes(x: Tensor, eps: float) -> dict[str, float]:
    """Return the sizes that the kernels take."""
    return dict(channels=x.shape[1], inner=x.numel() // x.shape[1], eps=eps)


def has_kernel(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Return whether the kernels normalise x, which has the batch last in memory, as `norm` does."""
    own = [*norm.parameters(recurse=False), norm.running_mean, norm.running_var]
    return (
        (norm.training or norm.running_mean is None)
        and available()
        and is_plain(x)
        and x.dtype in DTYPES
        and x.is_cpu
        and x.numel() > x.shape[1] == norm.num_features
        and all(tensor is None or (tensor.dtype == x.dtype and tensor.is_cpu) for tensor in own)
    )


def normalised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what `norm` makes of x, which has the batch last in memory; running statistics follow as torch's do."""
    y, mean, variance = Normalisation.apply(x, norm.weight, norm.bias, norm.eps)  # pyright: ignore
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        count = x.numel() // x.shape[1]
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (count / (count - 1)), share)
    return y
