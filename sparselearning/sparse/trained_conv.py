"""Convolutions that train on their active weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparselearning.sparse import ops
from sparselearning.sparse.arguments import numeric_padding
from sparselearning.sparse.dispatch import is_plain
from sparselearning.sparse.held import Held
from sparselearning.sparse.interface import conv_shape
from sparselearning.sparse.memory_order import is_batch_last, to_batch_first
from sparselearning.sparse.pooling import PooledConv2d
from sparselearning.sparse.trained import Single, in_autocast


class TrainedConv(Single):
    """A convolution of images (N, C, H, W), or of those (C, H, W)."""

    in_channels: int
    out_channels: int
    groups: int

    def as_convolution(self, shape: torch.Size):
        kernel, stride, padding, dilation, groups = self.geometry()
        sizes = (1, self.in_channels, *kernel, self.out_channels)
        return conv_shape(*sizes, kernel, stride, padding, dilation, groups, False)[0]

    def is_image(self, x: Tensor) -> bool:
        """Return whether (N, C, H, W) or (C, H, W) is an input of the layer."""
        kernel, _, padding, dilation, _ = self.geometry()
        padded = [size + 2 * pad for size, pad in zip(x.shape[-2:], padding, strict=False)]
        reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        return x.dim() in (3, 4) and x.shape[-3] == self.in_channels and all(map(int.__ge__, padded, reach))

    def convolved(self, held: Held, images: Tensor) -> Tensor:
        """Return the output for (N, C, H, W)."""
        y = ops.run("conv2d", images, held.value, self.bias, *held.indices(), *self.geometry(), False)
        return held.watch(images, y)

    def belong(self, x: Tensor, dy: Tensor, shape: torch.Size) -> bool:
        return x.dim() == 4 and self.is_image(x) and self.output_shape(x) == dy.shape

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of the output for (N, C, H, W)."""
        planes = self.entries.turned[0].numel() - 1
        return tuple(ops.checked(tuple(x.shape), self.out_channels, planes, self.geometry())[1])

    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same; a column stands for an input channel of each group, wherever in the filter it is."""
        channels = x.abs().sum((0, 2, 3)).reshape(self.groups, -1).sum(0)
        size = self.entries.width // max(len(channels), 1)
        return channels.repeat_interleave(size), dy.abs().sum((0, 2, 3))

    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        x, dy = to_batch_first(x), to_batch_first(dy)
        parts, each, per_group = [], self.in_channels // self.groups, self.out_channels // self.groups
        while first < last:  # the rest of a group, or whole groups
            group = first // per_group
            end = last if self.groups == 1 else min(last, (group + 1) * per_group)
            if first % per_group == 0 and last - first >= per_group:
                end = last - last % per_group
            groups = max((end - first) // per_group, 1)
            inputs = x.narrow(1, group * each, groups * each)
            parts.append(self._gradient(inputs, dy[:, first:end], groups))
            first = end
        return torch.cat(parts).flatten(1)

    def _gradient(self, x, dy, groups):
        kernel, stride, padding, dilation, _ = self.geometry()
        settings = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
        like = x.new_empty(1).expand(dy.shape[1], x.shape[1] // groups, *kernel)  # its shape alone is read
        return torch.ops.aten.convolution_backward(dy, x, like, *settings)[1]

    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        return ops.conv2d_weight_gradient(dy, x, start, column, *self.geometry(), False)[0]


class TrainedConv2d(TrainedConv, nn.Conv2d):
    """nn.Conv2d that trains on its active weights."""

    plain = nn.Conv2d

    def geometry(self):
        return self.kernel_size, self.stride, numeric_padding(self), self.dilation, self.groups

    def fits(self, x: Tensor) -> bool:
        return self.is_image(x)

    def product(self, held: Held, x: Tensor) -> Tensor:
        return self.convolved(held, x) if x.dim() == 4 else self.convolved(held, x.unsqueeze(0)).squeeze(0)

    def pooled(self, x: Tensor, size: tuple[int, int] | None) -> Tensor | None:
        """Return max-pool(ReLU(output)) with windows of `size`, computed at once; None where that cannot be."""
        held = self.held
        if size is None or held is None or held.observed.observing or not self.has_kernel(x) or in_autocast(held):
            return None
        if x.dim() != 4 or not is_batch_last(x.shape[0]) or not is_plain(x) or x.dtype != held.value.dtype:
            return None
        geometry, pixels = self.geometry(), self.output_shape(x)[2:]
        if not x.numel() or pixels[0] < size[0] or pixels[1] < size[1]:
            return None
        indices = held.indices()
        return PooledConv2d.apply(x, held.value, self.bias, *indices, geometry, size)  # pyright: ignore[reportReturnType]


class TrainedConv1d(TrainedConv, nn.Conv1d):
    """nn.Conv1d that trains on its active weights: a convolution of images of one row."""

    plain = nn.Conv1d

    def geometry(self):
        sizes = ((1, *self.kernel_size), (1, *self.stride), (0, *numeric_padding(self)), (1, *self.dilation))
        return *sizes, self.groups

    def fits(self, x: Tensor) -> bool:
        return x.dim() in (2, 3) and self.is_image(x.unsqueeze(-2))

    def product(self, held: Held, x: Tensor) -> Tensor:
        images = x.unsqueeze(-2) if x.dim() == 3 else x.unsqueeze(-2).unsqueeze(0)
        y = self.convolved(held, images).squeeze(2)
        return y if x.dim() == 3 else y.squeeze(0)
