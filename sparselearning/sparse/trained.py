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
from sparselearning.sparse.derivatives import transformed
from sparselearning.sparse.dispatch import is_plain
from sparselearning.sparse.held_weight import HeldWeight, hold, let_go
from sparselearning.sparse.interface import DTYPES, conv_shape, row_shape
from sparselearning.sparse.memory_order import is_batch_last, to_batch_first
from sparselearning.sparse.modules import numeric_padding
from sparselearning.sparse.observed import ObservedGradient
from sparselearning.sparse.pooling import PooledConv2d


class Trained(nn.Module, ABC):
    """What a linear or convolution layer needs to train on its active weights.

    The optimizer steps `value` (nonzeros,). `weight` stays the module's parameter, with zeros, and agrees with `value`
    but for the moment of a step; see held_weight.py. Whatever the kernels cannot do (another dtype or device, function
    transforms, a weight put in its place for one call) is computed with `weight`, whose gradient then goes to `value`.

    A copy of the model without its Masking is not `held`: it is a dense layer with zeros.
    """

    weight: Tensor
    value: nn.Parameter  # no parameter of the module: `weight` stands for it
    dense: HeldWeight  # the weight, whatever stands in its place for the moment
    observed: ObservedGradient
    position: Tensor  # of each value in the flattened weight
    place: Tensor  # of each value in the weight's memory, which may be channels_last
    strides: tuple[int, ...]  # of the weight that `place` is for
    indices: tuple[Tensor, ...]  # start, column, t_start, t_column, t_order
    held = False
    hooks: tuple[Any, ...]

    def begin(self, window: int, observing: bool) -> None:
        """Become a layer that trains sparsely, from a dense one; `window` and `observing` as ObservedGradient's."""
        value = nn.Parameter(self.weight.new_empty(0), self.weight.requires_grad)
        vars(self).update(value=value, dense=self.weight)
        self.observed = ObservedGradient(value, window, observing)
        self.attach()

    def attach(self) -> None:
        """Let the weight stand for the values; also in a copy."""
        self.held = True
        self.hooks = (
            self.dense.register_post_accumulate_grad_hook(self.receive),
            self.value.register_post_accumulate_grad_hook(lambda _: self.observed.commit()),
        )
        hold(self.dense, self.value)

    def end(self) -> None:
        """Become the dense layer again, zeros included."""
        if self.held:
            let_go(self.dense)
            for hook in self.hooks:
                hook.remove()
        for name in ("value", "dense", "observed", "position", "place", "strides", "indices", "held", "hooks"):
            vars(self).pop(name, None)
        self.__class__ = next(kind for kind, trained in KINDS.items() if trained is type(self))

    def __getstate__(self) -> dict[str, Any]:
        return {name: entry for name, entry in self.__dict__.items() if name not in ("held", "hooks")}

    @torch.no_grad()
    def follow(self, mask: Tensor) -> None:
        """Take the weights that `mask` marks as the new values; set the others to zero."""
        rows = mask.flatten(1)
        self.position = rows.flatten().nonzero().flatten()
        start = F.pad(rows.sum(1).cumsum(0), (1, 0)).int()
        column = (self.position % rows.shape[1]).int()
        self.indices = (start, column, *ops.transposed(start, column, self.as_convolution()))
        self.read()
        self.find_places()
        self.dense.zero_()
        self.write()

    @torch.no_grad()
    def read(self) -> None:
        """Set the values to those of the dense weight."""
        values = self.dense.flatten()[self.position]
        if values.shape == self.value.shape and values.dtype == self.value.dtype:
            if not torch.equal(values, self.value):
                self.value.copy_(values)
            return
        # Where the caller still holds the loss of the last step, its graph would expect gradients of the size that
        # there was. Only another dtype makes torch forget that.
        self.value.data = values.new_empty(0, dtype=torch.float16)
        self.value.data = values

    def find_places(self) -> None:
        """Find where the values lie in the memory of the dense weight."""
        self.strides = self.dense.stride()
        self.place = self.position
        if not self.dense.is_contiguous():
            index, self.place = self.position, torch.zeros_like(self.position)
            for size, stride in zip(reversed(self.dense.shape), reversed(self.strides), strict=True):
                self.place = self.place + index % size * stride
                index = index // size

    @torch.no_grad()
    def write(self) -> None:
        """Set the active places of the dense weight to the values."""
        if self.dense.stride() != self.strides:  # the model was moved to another memory format
            self.find_places()
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.dense.shape, self.strides, strict=True))
        self.dense.as_strided((span,), (1,)).scatter_(0, self.place, self.value.detach())
        self.dense.agrees()

    @torch.no_grad()
    def agree(self) -> None:
        """Take over what somebody else wrote into the weight, and set its inactive entries to zero again."""
        if not self.dense.was_written:
            return
        self.read()
        if self.dense.count_nonzero() != self.value.count_nonzero():
            self.dense.zero_()
        self.write()

    @torch.no_grad()
    def receive(self, weight: HeldWeight) -> None:
        """Give the values the gradient that arrived for the dense weight."""
        gradient = weight.arrived()
        if self.observed.observing:
            self.observed.collect(gradient)
        active = gradient.flatten()[self.position]
        self.value.grad = active if self.value.grad is None else self.value.grad.add_(active)
        self.observed.commit()

    @abstractmethod
    def as_convolution(self) -> Any:
        """Return the layer as a convolution of one image, as the kernels take it."""

    @abstractmethod
    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient of the dense weight."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return the layer's output, computed by the kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.has_kernel(input):
            return super().forward(input)
        self.look()
        if not self.in_autocast():
            return self.product(input)
        return self.product(input.float()).to(torch.get_autocast_dtype("cpu"))

    def look(self) -> None:
        """Take over what somebody wrote into the weight.

        Its inactive entries stay until a step: masks may be loaded after weights.
        """
        if not torch.compiler.is_compiling() and self.dense.was_written:
            self.read()

    def in_autocast(self) -> bool:
        """Return whether torch's own layer would compute in a narrower dtype; the kernels do in float32."""
        return torch.is_autocast_enabled("cpu") and self.value.dtype == torch.float32

    def has_kernel(self, x: Tensor) -> bool:
        """Return whether the kernels compute this input's output; autocast turns any into float32 for them."""
        return (
            self.held
            and isinstance(self.weight, HeldWeight)
            and x.device.type == self.value.device.type == "cpu"
            and self.value.dtype in DTYPES
            and (x.dtype == self.value.dtype or (self.in_autocast() and x.is_floating_point()))
            and self.fits(x)
            and not transformed()
        )

    @abstractmethod
    def fits(self, x: Tensor) -> bool:
        """Return whether the layer takes an input of this shape; torch's own layer says what is wrong with others."""

    def watch(self, x: Tensor, y: Tensor) -> Tensor:
        """Let the backward pass of y hand over the dense gradient, if this step is observed."""
        if self.observed.observing and y.requires_grad:
            x = x.detach()
            y.register_hook(lambda dy: self.collect(x, dy))
        return y

    @torch.no_grad()
    def collect(self, x: Tensor, dy: Tensor) -> None:
        self.observed.collect(self.weight_gradient(x, dy))

    def arguments(self):
        start, column, *turned = self.indices
        return self.value, self.bias, start, column, *turned

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.held:
            self.position = self.position.to(self.dense.device)
            self.find_places()
            self.read()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        # The weight stays the tensor that masks and optimizer know.
        if self.held:
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


class TrainedLinear(Trained, nn.Linear):
    """nn.Linear that trains on its active weights."""

    def as_convolution(self):
        return row_shape(1, self.in_features, self.out_features)

    def fits(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] == self.in_features

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.watch(rows, ops.run("linear", rows, *self.arguments(), False))
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

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

    def fits(self, x: Tensor) -> bool:
        padded = [size + 2 * pad for size, pad in zip(x.shape[-2:], numeric_padding(self), strict=False)]
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        return x.dim() in (3, 4) and x.shape[-3] == self.in_channels and all(map(int.__ge__, padded, reach))

    def product(self, x: Tensor) -> Tensor:
        images = x if x.dim() == 4 else x.unsqueeze(0)
        y = self.watch(images, ops.run("conv2d", images, *self.arguments(), *self.geometry(), False))
        return y if x.dim() == 4 else y.squeeze(0)

    def pooled(self, x: Tensor, size: tuple[int, int] | None) -> Tensor | None:
        """Return max-pool(ReLU(output)) with windows of `size`, computed at once; None where that cannot be."""
        plain = x.dim() == 4 and is_batch_last(x.shape[0]) and is_plain(x) and x.dtype == self.value.dtype
        if size is None or self.observed.observing or not plain or not self.has_kernel(x) or self.in_autocast():
            return None
        geometry = self.geometry()
        pixels = ops.checked(tuple(x.shape), self.out_channels, self.indices[2].numel() - 1, geometry)[1][2:]
        if not x.numel() or pixels[0] < size[0] or pixels[1] < size[1]:
            return None
        self.look()
        return PooledConv2d.apply(x, *self.arguments(), geometry, size)  # pyright: ignore[reportReturnType]

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        _, stride, padding, dilation, groups = self.geometry()
        x, dy = to_batch_first(x), to_batch_first(dy)
        settings = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
        return torch.ops.aten.convolution_backward(dy, x, self.dense, *settings)[1]


KINDS = {nn.Linear: TrainedLinear, nn.Conv2d: TrainedConv2d}


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
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "hooks read its gradient"
    if type(owners[0]) not in KINDS:
        return f"it belongs to a {type(owners[0]).__name__}"
    if isinstance(owners[0], nn.Conv2d):
        try:
            numeric_padding(owners[0])
        except ValueError as error:
            return str(error).rstrip(".")
    return ""
