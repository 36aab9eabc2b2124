"""Linear and convolution layers that hold and multiply only their active weights."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.sparse import ops
from sparselearning.sparse.library import available, conv_shape

logger = logging.getLogger(__name__)


class SparseLayer(nn.Module):
    """A weight of shape `weight_shape`, kept by its nonzeros, and the layer's bias.

    Parameters: `value` (nonzeros,) and `bias` or None. Buffers: `start` (rows + 1,) and `column` (nonzeros,), int32:
    row r holds values start[r] to start[r + 1], at these columns of the flattened row. With `relu` the layer ends
    in a ReLU.
    """

    value: nn.Parameter
    start: Tensor
    column: Tensor

    def __init__(self, weight_shape: torch.Size, bias: Tensor | None):
        super().__init__()
        self.weight_shape = torch.Size(weight_shape)
        self.relu = False
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.told = False

    def keep(self, weight: Tensor, mask: Tensor) -> None:
        """Take the weights that `mask` (bool, the shape of `weight`) marks."""
        rows, active = weight.detach().flatten(1), mask.flatten(1)
        self.value = nn.Parameter(rows[active])
        start = F.pad(active.sum(1).cumsum(0), (1, 0)).int()
        self.register_buffer("start", start)
        self.register_buffer("column", active.nonzero()[:, 1].int())
        self.index()

    def index(self) -> None:
        """Sort the nonzeros for the input gradient as well; derived, so not part of the state."""
        if available():
            start, column = self.start.cpu(), self.column.cpu()
            names = ("t_start", "t_column", "t_order")
            for name, indices in zip(names, ops.transposed(start, column, self.conv_shape()), strict=True):
                self.register_buffer(name, indices.to(self.start.device), persistent=False)

    def conv_shape(self):
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        raise NotImplementedError

    @property
    def density(self) -> float:
        """The share of active weights."""
        return len(self.value) / self.weight_shape.numel()

    def dense_weight(self) -> Tensor:
        """Return the weight with its zeros, differentiable in `value`."""
        rows = self.start.diff().long()
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)
        flat = row * self.weight_shape[1:].numel() + self.column
        return self.value.new_zeros(self.weight_shape.numel()).scatter(0, flat, self.value).reshape(self.weight_shape)

    @torch.no_grad()
    def fill_dense(self, layer):
        layer = layer.to(self.value)
        layer.weight.copy_(self.dense_weight())
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer.train(self.training)

    def runs_sparse(self, x: Tensor) -> bool:
        """Return whether there are kernels for x; if not, say so once."""
        if available() and x.device.type == "cpu":
            return True
        if not self.told and not torch.compiler.is_compiling():
            why = f"no sparse kernels for {x.device.type}" if available() else "built without sparse kernels"
            logger.warning("%s runs with its dense weight: %s.", type(self).__name__, why)
            self.told = True
        return False

    def arguments(self):
        # nn.Module takes half a microsecond to find an attribute; seven are a fifth of a small layer's time.
        own = {"bias": None, **self._parameters, **self._buffers}
        return tuple(own[name] for name in ("value", "bias", "start", "column", "t_start", "t_column", "t_order"))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        column = state_dict.get(prefix + "column")
        if column is not None and column.shape != self.column.shape:
            self.column = self.column.new_empty(column.shape)
            self.value = nn.Parameter(self.value.new_empty(column.shape), self.value.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.index()

    def extra_repr(self) -> str:
        relu = ", relu=True" if self.relu else ""
        return f"{tuple(self.weight_shape)}, density={self.density:.3f}, bias={self.bias is not None}{relu}"


class SparseLinear(SparseLayer):
    """A linear layer that multiplies only its active weights; input (..., in_features), as nn.Linear.

    >>> layer = SparseLinear.from_dense(nn.Linear(8, 4), torch.eye(4, 8) > 0)
    >>> len(layer.value), layer(torch.ones(2, 8)).shape
    (4, torch.Size([2, 4]))
    """

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """Return the sparse form of `linear`, with the weights of `mask` or else those that are not zero."""
        layer = cls(linear.weight.shape, linear.bias)
        layer.keep(linear.weight, active_weights(linear.weight, mask))
        return layer.train(linear.training)

    def conv_shape(self):
        return ops.row_shape(1, self.weight_shape[1], self.weight_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if not self.runs_sparse(x):
            y = F.linear(x, self.dense_weight(), self.bias)
            return y.relu() if self.relu else y
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y = ops.run("linear", rows, *self.arguments(), self.relu)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])

    def to_dense(self) -> nn.Linear:
        """Return the same layer with zeros where weights are inactive."""
        outputs, inputs = self.weight_shape
        return self.fill_dense(nn.Linear(inputs, outputs, self.bias is not None))


class SparseConv2d(SparseLayer):
    """A 2d convolution that multiplies only its active weights; input (N, C, H, W) or (C, H, W), as nn.Conv2d.

    From 16 images on, the output's memory is ordered with the batch last, which the next sparse layer reads as it is.
    """

    def __init__(self, weight_shape, bias, stride, padding, dilation, groups):
        super().__init__(weight_shape, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> SparseConv2d:
        """Return the sparse form of `conv`, with the weights of `mask` or else those that are not zero.

        Raises:
            ValueError: for a padding_mode other than 'zeros', or padding='same' with an even kernel.
        """
        padding = numeric_padding(conv)
        layer = cls(conv.weight.shape, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
        layer.keep(conv.weight, active_weights(conv.weight, mask))
        return layer.train(conv.training)

    def geometry(self):
        return self.weight_shape[2:], self.stride, self.padding, self.dilation, self.groups

    def conv_shape(self):
        outputs, inputs, *kernel = self.weight_shape
        rest = (self.stride, self.padding, self.dilation, self.groups, False)
        return conv_shape(1, inputs * self.groups, *kernel, outputs, tuple(kernel), *rest)[0]

    def forward(self, x: Tensor) -> Tensor:
        if not self.runs_sparse(x):
            _, *geometry = self.geometry()
            y = F.conv2d(x, self.dense_weight(), self.bias, *geometry)
            return y.relu() if self.relu else y
        images = x if x.dim() == 4 else x.unsqueeze(0)
        y = ops.run("conv2d", images, *self.arguments(), *self.geometry(), self.relu)
        return y if x.dim() == 4 else y.squeeze(0)

    def to_dense(self) -> nn.Conv2d:
        """Return the same layer with zeros where weights are inactive."""
        outputs, inputs, height, width = self.weight_shape
        rest = (self.stride, self.padding, self.dilation, self.groups, self.bias is not None)
        return self.fill_dense(nn.Conv2d(inputs * self.groups, outputs, (height, width), *rest))


def active_weights(weight: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return weight.detach() != 0
    if mask.shape != weight.shape:
        raise ValueError(f"Expected a mask of the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}.")
    return mask.bool()


def numeric_padding(conv: nn.Conv2d) -> tuple[int, ...]:
    """Return the padding of `conv` as numbers."""
    if conv.padding_mode != "zeros":
        raise ValueError(f"Sparse convolutions pad with zeros; keep padding_mode={conv.padding_mode!r} dense.")
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            raise ValueError("padding='same' with an even kernel pads unevenly; keep this convolution dense.")
        return tuple(total // 2 for total in totals)
    return (0, 0)
