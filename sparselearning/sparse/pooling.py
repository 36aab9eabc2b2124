"""Max-pooling, and of activations whose batch is last in memory with the ReLU and the sparse convolution before it.

torch's own writes an index of eight bytes for each result, and its gradient fills the input's with zeros first; a ReLU
before it reads and writes all of them once more, both ways. Here the place of each maximum takes a byte, which also
says that the ReLU cut it. With the convolution before it, nothing as large as its output is ever written: windows are
pooled while their sums are in a cache, and the gradients of the convolution read the pooled one.

Planes in plain order have a kernel of their own, without gradients: torch's took a fifth of the time of a converted
ResNet-50. So do means of whole planes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparselearning.sparse.derivatives import dense_weight
from sparselearning.sparse.dispatch import is_plain, unobserved
from sparselearning.sparse.interface import DTYPES, available, call
from sparselearning.sparse.memory_order import in_order, is_turned, new_output, reads_first, to_batch_last
from sparselearning.sparse.ops import checked

MOST_PIXELS = 255  # of a window
Size = tuple[int, int]


class MaxPool(torch.autograd.Function):
    """The largest number of each window of x (N, C, H, W) in CHWN order; windows of `size` do not overlap.

    With `relu` zero takes the place of what is below it. Gradients are exact, and differentiable again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: Size, relu: bool):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, place = outputs(x, x.shape, size)
        call("pool", y, x=x, relu=relu, **window_arguments(place, size), **sizes(x.shape))
        ctx.save_for_backward(place)
        ctx.input_shape, ctx.size = x.shape, size
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (place,) = ctx.saved_tensors
        if not unobserved(dy):
            return unpooled(dy, place, ctx.input_shape, ctx.size), None, None
        dx = new_output(dy, ctx.input_shape, True)
        call("pool_gradient", dx, dy=to_batch_last(dy), **window_arguments(place, ctx.size), **sizes(ctx.input_shape))
        return dx, None, None


class PooledConv2d(torch.autograd.Function):
    """max-pool(ReLU(sparse convolution of x)), its output in CHWN order; windows of `size` do not overlap.

    `indices` and `geometry` as the operators of ops.py take them. Gradients are exact, and differentiable again.
    """

    @staticmethod
    def forward(ctx, x, value, bias, *rest):  # pyright: ignore[reportIncompatibleMethodOverride]
        *indices, geometry, size = rest
        start, column, t_start, *_ = indices
        x_first = reads_first(x, True, geometry[1])
        layer = (start.numel() - 1, t_start.numel() - 1, geometry, True)
        conv, shape = checked(tuple(x.shape), *layer, (x_first, False))
        y, place = outputs(x, shape, size)
        x = x.contiguous() if x_first else in_order(x, True)
        tensors = dict(x=x, start=start, column=column, value=value, bias=bias)
        call("forward", y, conv=conv, relu=True, **tensors, **window_arguments(place, size))
        ctx.save_for_backward(x, value, bias, *indices, place)
        ctx.geometry, ctx.size, ctx.conv, ctx.turned = geometry, size, conv, checked(tuple(x.shape), *layer)[0]
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, value, bias, start, column, t_start, t_column, t_order, place = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        nothing = [None] * (len(ctx.needs_input_grad) - 3)
        if not unobserved(dy):
            return *exact_gradients(ctx, dy, (x, value, bias), (start, column)), *nothing
        given = dict(dy=to_batch_last(dy), **window_arguments(place, ctx.size))
        dx = dvalue = dbias = None
        if needed[0]:
            dx = new_output(dy, x.shape, True)
            indices = dict(start=t_start, column=t_column, order=t_order)
            call("input_gradient", dx, conv=ctx.turned, value=value, **indices, **given)
        if needed[1] or needed[2]:
            dvalue, dbias = torch.empty_like(value), dy.new_empty(len(start) - 1 if needed[2] else 0)
            call("weight_gradient", dvalue, conv=ctx.conv, x=x, start=start, column=column, dbias=dbias, **given)
        return dx, dvalue if needed[1] else None, dbias if needed[2] else None, *nothing


class BatchLastPool:
    """Pooling that keeps the memory order of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4 and is_turned(input):
            return super().forward(input.transpose(0, 1)).transpose(0, 1)  # pyright: ignore[reportAttributeAccessIssue]
        return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]


class BatchLastAvgPool2d(BatchLastPool, nn.AvgPool2d):
    """nn.AvgPool2d that keeps the memory order of its input."""


class BatchLastAdaptiveAvgPool2d(BatchLastPool, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d that keeps the memory order of its input; that of single pixels is plain."""

    def forward(self, input: Tensor) -> Tensor:
        if _pair(self.output_size) == (1, 1) and input.dim() == 4:
            if can_read(input) and input.numel() and not (input.requires_grad and torch.is_grad_enabled()):
                return average_planes(input)
            if is_turned(input):
                return mean_of_planes(input)
        return super().forward(input)


class BatchLastMaxPool2d(BatchLastPool, nn.MaxPool2d):
    """nn.MaxPool2d that keeps the memory order of its input."""

    def forward(self, input: Tensor) -> Tensor:
        if self.has_kernel(input):
            return self.pooled(input)
        if self.slides(input):
            return pool_planes(input, *self.pairs(), self.ceil_mode)
        return super().forward(input)

    def pairs(self) -> tuple[Size, Size, Size]:
        """Return kernel, stride and padding."""
        return _pair(self.kernel_size), _pair(self.stride), _pair(self.padding)  # pyright: ignore[reportReturnType]

    def window(self) -> Size | None:
        """Return the size of the windows, or None if the kernels have none such."""
        size, stride, padding = self.pairs()
        plain = (stride, padding, _pair(self.dilation)) == (size, (0, 0), (1, 1))
        fits = plain and not (self.ceil_mode or self.return_indices) and size[0] * size[1] <= MOST_PIXELS
        return size if fits else None

    def has_kernel(self, x: Tensor) -> bool:
        """Return whether the kernels pool x."""
        size = self.window()
        return size is not None and can_read(x) and is_turned(x) and x.shape[2] >= size[0] and x.shape[3] >= size[1]

    def slides(self, x: Tensor) -> bool:
        """Return whether the kernels pool x in plain order, without gradients."""
        kernel, stride, padding = self.pairs()
        return (
            can_read(x)
            and x.is_contiguous()
            and not (x.requires_grad and torch.is_grad_enabled())
            and not self.return_indices
            and _pair(self.dilation) == (1, 1)
            and min(stride) > 0
            and all(0 <= 2 * pad <= size for pad, size in zip(padding, kernel, strict=True))
            and min(pooled_shape(x.shape, kernel, stride, padding, self.ceil_mode)) > 0
        )

    def pooled(self, x: Tensor, relu: bool = False) -> Tensor:
        """Return x pooled, or its ReLU; `has_kernel` must hold."""
        return MaxPool.apply(x, self.window(), relu)  # pyright: ignore[reportReturnType]


def mean_of_planes(x: Tensor) -> Tensor:
    """Return the mean (N, C, 1, 1), in plain order, of each plane of x (N, C, H, W) in CHWN order.

    torch adds up one dimension between others many times as fast as two strided ones.
    """
    return x.movedim(0, -1).flatten(1, 2).mean(1).T.contiguous()[:, :, None, None]


def average_planes(x: Tensor) -> Tensor:
    """Return the mean (N, C, 1, 1), in plain order, of each plane of x (N, C, H, W); without gradients."""
    images, channels, height, width = x.shape
    y = x.new_empty(images, channels, 1, 1)
    turned = is_turned(x)
    planes, inner = (channels, images) if turned else (images * channels, 1)
    call("average_planes", y, x=x if turned else x.contiguous(), planes=planes, pixels=height * width, inner=inner)
    return y


def can_read(x: Tensor) -> bool:
    """Return whether kernels that pool can read x: images on the CPU that nothing watches."""
    return available() and is_plain(x) and x.dtype in DTYPES and x.is_cpu and x.dim() == 4


def pooled_shape(shape: Sequence[int], kernel: Size, stride: Size, padding: Size, ceil_mode: bool) -> tuple[int, ...]:
    """Return the shape of a pooled tensor, as torch makes it: with `ceil_mode` the last window may reach beyond.

    >>> pooled_shape((1, 1, 7, 7), (2, 2), (2, 2), (0, 0), True)
    (1, 1, 4, 4)
    """
    sizes = []
    for size, k, step, pad in zip(shape[2:], kernel, stride, padding, strict=True):
        most = (size + 2 * pad - k + (step - 1 if ceil_mode else 0)) // step
        sizes.append(most if ceil_mode and most * step >= size + pad else most + 1)  # no window begins after the end
    return *shape[:2], *sizes


def pool_planes(x: Tensor, kernel: Size, stride: Size, padding: Size, ceil_mode: bool = False) -> Tensor:
    """Return the largest number of each window of x (N, C, H, W) in plain order; without gradients."""
    y = x.new_empty(pooled_shape(x.shape, kernel, stride, padding, ceil_mode))
    sizes = dict(planes=x.shape[0] * x.shape[1], height=x.shape[2], width=x.shape[3])
    sizes |= dict(out_height=y.shape[2], out_width=y.shape[3])
    for name, pair in (("kernel", kernel), ("stride", stride), ("pad", padding)):
        sizes |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
    call("pool_planes", y, x=x, **sizes)
    return y


def exact_gradients(ctx, dy, inputs, indices):
    """Return the gradients of a pooled convolution by torch's own operations, which have gradients again."""
    (x, value, bias), (start, column) = inputs, indices
    kernel, stride, padding, dilation, groups = ctx.geometry
    needed = ctx.needs_input_grad[:3]
    given = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    with torch.enable_grad():
        shape = torch.Size((len(start) - 1, x.shape[1] // groups, *kernel))
        y = F.conv2d(x, dense_weight(value, start, column, shape), bias, stride, padding, dilation, groups)
        found = iter(torch.autograd.grad(F.max_pool2d(F.relu(y), ctx.size), given, dy, create_graph=True))
    return [next(found) if need else None for need in needed]


def outputs(x: Tensor, shape: Sequence[int], size: Size) -> tuple[Tensor, Tensor]:
    """Return the tensors that a pooling of this shape writes: its output, and where each number came from."""
    y = new_output(x, (*shape[:2], shape[2] // size[0], shape[3] // size[1]), True)
    return y, torch.empty_like(y, dtype=torch.uint8)


def window_arguments(place: Tensor, size: Size) -> dict[str, Tensor | int]:
    """Return what the kernels take of a pooling."""
    return dict(place=place, window_y=size[0], window_x=size[1])


def sizes(shape: torch.Size) -> dict[str, int]:
    """Return the sizes that the kernels take, for a pooled input of this shape."""
    images, channels, height, width = shape
    return dict(channels=channels, height=height, width=width, inner=images)


def unpooled(dy: Tensor, place: Tensor, shape: torch.Size, size: Size) -> Tensor:
    """Return the gradient of a pooling's input by torch's own operations, which have gradients again."""
    pixels = torch.stack([dy * (place == pixel) for pixel in range(size[0] * size[1])], -1)
    images, channels, rows, columns = place.shape
    pixels = pixels.reshape(images, channels, rows, columns, *size).transpose(3, 4)
    dx = pixels.reshape(images, channels, rows * size[0], columns * size[1])
    return F.pad(dx, (0, shape[3] - dx.shape[3], 0, shape[2] - dx.shape[2]))
