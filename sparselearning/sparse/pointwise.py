"""Dense convolutions of single pixels beside sparse layers, on images whose batch is last in memory.

Erdos-Renyi-kernel leaves many such layers with few zeros. In CHWN order each is one matrix product of its weight and
the pixels of all images, as they lie. torch's convolution would copy the images into another order, and return that: a
sum of both orders takes several times as long as one of two alike.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparselearning.sparse.dispatch import unobserved
from sparselearning.sparse.memory_order import is_batch_last, is_turned, to_batch_last
from sparselearning.sparse.pooling import can_read

# matrix @ columns by oneDNN. On one thread torch gives most of these convolutions to its BLAS, and MKL holds
# processors that are not of Intel to half of their widest vectors: half the speed.
BY_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int] = (1, 1)) -> Tensor | None:
    """Return the convolution of x (N, C, H, W) with weight (K, C, 1, 1), in new memory and in the order of x.

    The result is (N, K, H / stride, W / stride). It is in CHWN order where sparse layers have it so; in channels_last,
    and on images whose order is left to torch, the product is oneDNN's or None: then torch's convolution is as good.
    """
    turned, matrix = with_batch_last(x), weight.flatten(1)
    if turned is not None:
        pixels = turned.movedim(0, -1)[:, :: stride[0], :: stride[1]]
        y = product_of_columns(matrix, pixels.flatten(1), bias)
        return y.unflatten(1, pixels.shape[1:]).movedim(-1, 0)
    if not (can_read(x) and x.is_contiguous(memory_format=torch.channels_last) and can_be_onednn(matrix, x)):
        return None
    pixels = x[:, :, :: stride[0], :: stride[1]].movedim(1, -1)
    y = BY_ONEDNN(pixels.flatten(0, 2), matrix, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]
    return y.unflatten(0, pixels.shape[:3]).movedim(-1, 1)


def product_of_columns(matrix: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Return matrix @ columns + bias, which is one for each row."""
    if can_be_onednn(matrix, columns):
        y = BY_ONEDNN(matrix, columns.t(), None, "none", [], "")  # pyright: ignore[reportOptionalCall]
        return y if bias is None else y.add_(bias[:, None])
    return matrix @ columns if bias is None else torch.addmm(bias[:, None], matrix, columns)


def can_be_onednn(*operands: Tensor) -> bool:
    """Return whether the product of these can be oneDNN's, which torch neither records nor traces."""
    plain = all(unobserved(each) and each.is_cpu and each.dtype is torch.float32 for each in operands)
    may = torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
    return BY_ONEDNN is not None and may and plain and all(each.numel() for each in operands)


def with_batch_last(x: Tensor) -> Tensor | None:
    """Return images in CHWN order if sparse layers keep them so; None for others, and where gradients are wanted.

    A single image in NCHW order is in CHWN order, too.
    """
    if x.dim() == 4 and is_turned(x):
        return x
    may_turn = can_read(x) and x.numel() > 0 and not torch.is_grad_enabled()  # asks for no sizes while torch traces
    turns = may_turn and (is_batch_last(len(x)) or (len(x) == 1 and x.is_contiguous()))
    return to_batch_last(x) if turns else None


def is_pointwise(weight: Tensor, padding: Any, groups: int) -> bool:
    """Return whether a convolution with such arguments of F.conv2d reads single pixels, of all channels."""
    return weight.shape[2:] == (1, 1) and groups == 1 and (padding == "valid" or _pair(padding) in ((0, 0), [0, 0]))


class PointwiseConv2d(nn.Conv2d):
    """A dense convolution of single pixels, and the ReLU after it, that give images as sparse layers do."""

    relu: bool

    @classmethod
    def of(cls, layer: nn.Module, relu: bool) -> PointwiseConv2d | None:
        """Return what `layer` computes, with the same parameters; None if it is no such convolution."""
        if type(layer) is not nn.Conv2d or not is_pointwise(layer.weight, layer.padding, layer.groups):
            return None
        keeping: Any = copy.copy(layer)
        keeping.__class__, keeping.relu = cls, relu
        return keeping

    def forward(self, input: Tensor) -> Tensor:
        fits = input.dim() == 4 and input.shape[1] == self.in_channels  # what does not gets torch's error
        (down, right) = _pair(self.stride)
        y = product(input, self.weight, self.bias, (down, right)) if fits else None
        y = super().forward(input) if y is None else y
        return y.relu_() if self.relu else y

    def extra_repr(self) -> str:
        return super().extra_repr() + (", relu=True" if self.relu else "")
