"""Linear and convolution layers that train on their active weights alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.layers import SparseLayer
from sparselearning.sparse import ops
from sparselearning.sparse.batch_last import forget_order
from sparselearning.sparse.interface import DTYPES, conv_shape, row_shape
from sparselearning.sparse.memory_order import to_batch_first
from sparselearning.sparse.modules import numeric_padding


class Trained(nn.Module, ABC):
    """What a linear or convolution layer needs to train on its active weights.

    `value` (nonzeros,) is the parameter that is trained. `weight` stays, with zeros, for whoever reads it: it follows
    `value` after each step, and a state_dict holds it.
    """

    weight: Tensor
    value: nn.Parameter
    position: Tensor  # of each value in the flattened weight
    place: Tensor  # of each value in the weight's memory, which may be channels_last
    strides: tuple[int, ...]  # of the weight that `place` is for
    indices: tuple[Tensor, ...]  # start, column, t_start, t_column, t_order

    def begin(self, window: int, observing: bool) -> None:
        """Become a layer that trains sparsely, from a dense one.

        The gradient of the dense weight is observed on steps that are `observing`; the last `window` of them count.
        """
        self.weight.requires_grad_(False)
        self.value = nn.Parameter(self.weight.new_empty(0))
        self.window, self.observing, self.observed = window, observing, 0
        self.gradient: Tensor | None = None  # sum of dense gradients over `observed` steps

    @torch.no_grad()
    def follow(self, mask: Tensor) -> None:
        """Take the weights that `mask` marks as the new values; set the others to zero."""
        rows = mask.flatten(1)
        self.position = rows.flatten().nonzero().flatten()
        start = F.pad(rows.sum(1).cumsum(0), (1, 0)).int()
        column = (self.position % rows.shape[1]).int()
        self.indices = (start, column, *ops.transposed(start, column, self.as_convolution()))
        self.read()
        self.weight.zero_()
        self.find_places()
        self.write()

    @torch.no_grad()
    def read(self) -> None:
        """Set the values to those of the dense weight."""
        # Where the caller still holds the loss of the last step, its graph would expect gradients of the size that
        # there was. Only another dtype makes torch forget that.
        self.value.data = self.value.new_empty(0, dtype=torch.float16)
        self.value.data = self.weight.flatten()[self.position]

    def find_places(self) -> None:
        """Find where the values lie in the memory of the dense weight."""
        self.strides = self.weight.stride()
        self.place = self.position
        if not self.weight.is_contiguous():
            index, self.place = self.position, torch.zeros_like(self.position)
            for size, stride in zip(reversed(self.weight.shape), reversed(self.strides), strict=True):
                self.place = self.place + index % size * stride
                index = index // size

    @torch.no_grad()
    def write(self) -> None:
        """Set the active places of the dense weight to the values."""
        if self.weight.stride() != self.strides:  # the model was moved to another memory format
            self.find_places()
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.weight.shape, self.strides, strict=True))
        self.weight.as_strided((span,), (1,)).scatter_(0, self.place, self.value.detach())

    def end(self) -> None:
        """Become the dense layer again, zeros included."""
        del self.value
        self.weight.requires_grad_(True)
        self.__class__ = next(kind for kind, trained in KINDS.items() if trained is type(self))

    @abstractmethod
    def as_convolution(self) -> Any:
        """Return the layer as a convolution of one image, as the kernels take it."""

    @abstractmethod
    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient of the dense weight."""

    def watch(self, x: Tensor, y: Tensor) -> Tensor:
        """Let the backward pass of y add the dense gradient, if this step is observed."""
        if self.observing and y.requires_grad:
            x = x.detach()
            y.register_hook(lambda dy: self.collect(x, dy))
        return y

    @torch.no_grad()
    def collect(self, x: Tensor, dy: Tensor) -> None:
        gradient = self.weight_gradient(x, dy)
        if self.window == 1 and self.observed:  # of an earlier step
            self.gradient, self.observed = None, 0
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)

    @torch.no_grad()
    def count_observed(self) -> None:
        """Count a step. If more than `window` were observed, the earlier ones fade, as they do from a momentum."""
        self.observed += self.observing
        if self.observed > self.window and self.gradient is not None:
            self.gradient.mul_(self.window / self.observed)
            self.observed = self.window

    def arguments(self):
        start, column, *turned = self.indices
        return self.value, self.bias, start, column, *turned

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "value"]

    def _load_from_state_dict(self, *args, **kwargs):
        value = self._parameters.pop("value")
        super()._load_from_state_dict(*args, **kwargs)
        self.register_parameter("value", value)
        self.read()


class TrainedLinear(Trained, nn.Linear):
    """nn.Linear that trains on its active weights."""

    def as_convolution(self):
        return row_shape(1, self.in_features, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        y = self.watch(rows, torch.ops.sparselearning.linear(rows, *self.arguments(), False))
        return y if input.dim() == 2 else y.reshape(*input.shape[:-1], y.shape[-1])

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        return dy.t() @ x


class TrainedConv2d(Trained, nn.Conv2d):
    """nn.Conv2d that trains on its active weights."""

    def geometry(self):
        return self.kernel_size, self.stride, numeric_padding(self), self.dilation, self.groups

    def as_convolution(self):
        kernel, stride, padding, dilation, groups = self.geometry()
        shape = (1, self.in_channels, *kernel, self.out_channels)
        return conv_shape(*shape, kernel, stride, padding, dilation, groups, False)[0]

    def forward(self, input: Tensor) -> Tensor:
        images = input if input.dim() == 4 else input.unsqueeze(0)
        y = self.watch(images, torch.ops.sparselearning.conv2d(images, *self.arguments(), *self.geometry(), False))
        return y if input.dim() == 4 else y.squeeze(0)

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        _, stride, padding, dilation, groups = self.geometry()
        x, dy = to_batch_first(x), to_batch_first(dy)
        settings = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
        return torch.ops.aten.convolution_backward(dy, x, self.weight, *settings)[1]


KINDS = {nn.Linear: TrainedLinear, nn.Conv2d: TrainedConv2d}


def trained_to_dense(model: nn.Module) -> None:
    """Turn a model that was trained on sparse kernels into one of torch's own layers, in place and zeros included."""
    for module in list(model.modules()):
        if isinstance(module, Trained):
            module.end()
    forget_order(model)


def owners_of(module: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the id of each parameter -> the modules inside `module` that hold it directly."""
    owners: dict[int, list[nn.Module]] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(part)
    return owners


def why_not(layer: SparseLayer, owners: Sequence[nn.Module]) -> str:
    """Return why a weight cannot be trained on the kernels, or nothing if it can."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return f"no kernels for {weight.dtype} on {weight.device.type}"
    if weight is not layer.master or len(owners) != 1:
        return "it is tied, or a copy"
    if type(owners[0]) not in KINDS:
        return f"it belongs to a {type(owners[0]).__name__}"
    if isinstance(owners[0], nn.Conv2d):
        try:
            numeric_padding(owners[0])
        except ValueError as error:
            return str(error).rstrip(".")
    return ""
