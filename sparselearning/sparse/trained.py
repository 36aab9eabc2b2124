"""Linear and convolution layers that train on their active weights, and hold no others."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.compact import COMPACT, is_compact, position_of, weight_of
from sparselearning.layer import SparseLayer
from sparselearning.loading import check_compact
from sparselearning.sparse import ops
from sparselearning.sparse.averaging import Member
from sparselearning.sparse.derivatives import transformed
from sparselearning.sparse.dispatch import is_plain
from sparselearning.sparse.entries import Entries
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.interface import DTYPES, conv_shape, row_shape
from sparselearning.sparse.memory_order import is_batch_last, to_batch_first
from sparselearning.sparse.modules import numeric_padding
from sparselearning.sparse.observed import Observed, Pass
from sparselearning.sparse.on_demand import on_demand
from sparselearning.sparse.pooling import PooledConv2d


def alive(here: weakref.ref[Any]) -> Trained:
    """Return the layer that a hook belongs to."""
    layer = here()
    assert layer is not None, "the optimizer still steps the weights of a model that is gone"
    return layer


class Trained(nn.Module, ABC):
    """What a linear or convolution layer needs to train on its active weights.

    The optimizer steps `value` (nonzeros,). `weight` stays the module's parameter, of the same shape, but holds no
    numbers of its own; see held_weight.py. Whatever the kernels cannot do (another dtype or device, function
    transforms, a weight put in its place for one call) is computed with the dense weight, whose gradient then goes to
    the values.

    A copy of the model without its Masking is not `held`: it is a dense layer with zeros.
    """

    weight: Tensor
    dense: HeldWeight  # the weight, whatever stands in its place for the moment
    entries: Entries
    observed: Observed
    member: Member | None = None  # of those whose gradients are averaged over processes
    loaded: Tensor | None = None  # where the entries of a loaded optimizer state are, int64
    channels_last = False  # whether the weight was so in memory, and will be at the end
    held = False
    hooks: tuple[Any, ...]

    @property
    def value(self) -> nn.Parameter:
        """The active values, row by row; no parameter of the module, for `weight` stands for it."""
        return self.entries.value

    def begin(self, position: Tensor, observed: Observed, value: Tensor | None = None) -> None:
        """Become a layer that trains sparsely, from a dense one, with the entries at `position`.

        `value` are their values if the weight has none (on the meta device).
        """
        if value is None:
            value = self.weight.detach().flatten()[position]
        value = value.requires_grad_(self.weight.requires_grad)
        vars(self)["channels_last"] = is_channels_last(self.weight)
        vars(self)["entries"] = Entries(self.weight.shape, value, position, self.turned)
        vars(self)["observed"] = observed
        self.attach()

    def attach(self) -> None:
        """Let the values stand in place of the weight's numbers; also in a copy."""
        weight = self._parameters["weight"]
        assert weight is not None
        held = HeldWeight(self.entries, self.value.requires_grad)
        weight.grad = None
        torch.utils.swap_tensors(weight, held)
        vars(self).update(held=True, dense=weight)
        self.connect()

    def connect(self) -> None:
        """Let gradients of weight and values be noticed."""
        for hook in vars(self).get("hooks", ()):
            hook.remove()
        # Those of the weight that was exchanged (`swap_tensors`); torch would not call new ones beside them.
        self.dense._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]
        notice = super(HeldWeight, self.dense).register_post_accumulate_grad_hook
        here = weakref.ref(self)  # torch's tensors keep their hooks where no garbage collection sees a cycle
        self.hooks = (
            notice(lambda weight: alive(here).receive(weight)),
            self.value.register_post_accumulate_grad_hook(lambda _: alive(here).arrived()),
        )

    def end(self) -> None:
        """Become the dense layer again, zeros included."""
        if self.held:
            for hook in self.hooks:
                hook.remove()
            weight = nn.Parameter(
                self.entries.dense().contiguous(memory_format=self.memory_format()), self.dense.requires_grad
            )
            torch.utils.swap_tensors(self.dense, weight)
        for name in ("dense", "entries", "observed", "held", "hooks", "loaded", "member", "channels_last"):
            vars(self).pop(name, None)
        self.__class__ = next(kind for kind, trained in KINDS.items() if trained is type(self))

    def arrived(self) -> None:
        """Note that torch has accumulated the values' gradient."""
        if self.member is None:
            self.complete()
        else:
            self.member.arrived()

    def complete(self) -> None:
        """Note that the values' gradient is complete."""
        self.observed.commit(self.value.grad)

    def memory_format(self) -> torch.memory_format:
        """Return that of the dense weight."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: entry for name, entry in self.__dict__.items() if name not in ("held", "dense", "hooks", "member")
        }

    def turned(self, start: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nonzeros in the order of the input gradient."""
        return ops.transposed(start, column, self.as_convolution())

    @torch.no_grad()
    def receive(self, weight: HeldWeight) -> None:
        """Give the values the gradient that arrived for the dense weight."""
        gradient = weight.arrived()
        if self.observed.observing:
            self.observed.collect(Pass(dense=gradient), self.value.grad)
        active = gradient.flatten()[self.entries.position]
        if self.member is not None:
            self.member.add(active)
            return
        self.value.grad = active if self.value.grad is None else self.value.grad.add_(active)
        self.complete()

    @abstractmethod
    def as_convolution(self) -> Any:
        """Return the layer as a convolution of one image, as the kernels take it."""

    @abstractmethod
    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of the output for rows, or images, of this shape."""

    @abstractmethod
    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of |x| for each column of the weight's matrix, and that of |dy| for each row."""

    @abstractmethod
    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient of some rows of the weight's matrix, (last - first, width)."""

    @abstractmethod
    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        """Return the gradient of some entries of the weight, (entries,); rows and columns as `Entries` has them."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return the layer's output, computed by the kernels."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.has_kernel(input):
            return super().forward(input)
        if not self.in_autocast():
            return self.product(input)
        return self.product(input.float()).to(torch.get_autocast_dtype("cpu"))

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
        """Let the backward pass of y hand over what the dense gradient follows from, if this step is observed."""
        if self.observed.observing and y.requires_grad:
            # What a layer has computed nobody writes any more; an input may be a buffer for the next batch, too.
            x = x.detach() if x.requires_grad else x.clone()
            y.register_hook(lambda dy: self.observed.collect(Pass(x, dy.detach()), self.value.grad))
        return y

    def arguments(self):
        entries = self.entries
        return entries.value, self.bias, entries.start, entries.column, *entries.turned

    def _apply(self, fn, recurse=True):
        if not self.held:
            return super()._apply(fn, recurse)
        weight, entries = self._parameters.pop("weight"), self.entries
        assert weight is not None
        try:
            super()._apply(fn, recurse)
            with torch.no_grad():
                entries.apply(fn)
                if weight.dim() == 4:
                    small = self.value.new_zeros(2, 2, 2, 2).contiguous(memory_format=self.memory_format())
                    self.channels_last = is_channels_last(fn(small))
        finally:
            self._parameters = {"weight": weight, **self._parameters}
        if (weight.dtype, weight.device) != (self.value.dtype, self.value.device):
            self.attach()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}weight"
        if isinstance(destination[key], HeldWeight) and not keep_vars:
            entries = self.entries
            destination[key] = weight_of(entries) if COMPACT.get() else on_demand(entries.dense(), entries.write)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        # The weight stays the tensor that masks and optimizer know.
        if self.held:
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        key = f"{prefix}weight"
        if not self.held or not is_compact(state_dict.get(key)):
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        check_compact(repr(key), state_dict[key], self.entries.shape)
        own = {name: entry for name, entry in state_dict.items() if name != key}
        weight = self._parameters.pop("weight")
        try:
            super()._load_from_state_dict(own, prefix, local_metadata, *args, **kwargs)
            self.entries.load(position_of(state_dict[key]), state_dict[key]["value"])
        finally:
            self._parameters = {"weight": weight, **self._parameters}


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

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        return len(x), self.out_features

    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs().sum(0), dy.abs().sum(0)

    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        return dy[:, first:last].t() @ x

    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        return ops.linear_weight_gradient(dy, x, start, column, False)[0]


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
        geometry, pixels = self.geometry(), self.output_shape(x)[2:]
        if not x.numel() or pixels[0] < size[0] or pixels[1] < size[1]:
            return None
        return PooledConv2d.apply(x, *self.arguments(), geometry, size)  # pyright: ignore[reportReturnType]

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
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


KINDS = {nn.Linear: TrainedLinear, nn.Conv2d: TrainedConv2d}


def is_channels_last(weight: Tensor) -> bool:
    """Return whether a weight has the memory format of that name."""
    turned = weight.dim() == 4 and not weight.is_contiguous()
    return turned and weight.is_contiguous(memory_format=torch.channels_last)


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
    if weight.device.type not in ("cpu", "meta") or weight.dtype not in DTYPES:
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
