"""torch's own layers on activations whose batch is last in memory.

torch sees CHWN memory as the channels_last order of a tensor whose channels and batch are exchanged. Pooling treats
channels and images alike, so it is exact and fast on that exchanged view. Max-pooling of windows that do not overlap
(pooling.py), with the ReLU before it (rows.py), and a batch norm by the statistics of the batch (normalisation.py) have
kernels; any other batch norm is given (1, C, H * W * N).
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from sparselearning.sparse.dispatch import unobserved
from sparselearning.sparse.memory_order import is_turned, to_batch_first
from sparselearning.sparse.modules import SparseConv2d, SparseLinear, SparseModule
from sparselearning.sparse.normalisation import has_kernel, normalised
from sparselearning.sparse.pooling import BatchLastAdaptiveAvgPool2d, BatchLastAvgPool2d, BatchLastMaxPool2d
from sparselearning.sparse.rows import Row, row_for
from sparselearning.sparse.trained import Trained


class BatchLastBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps the memory order of its input."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            super()._check_input_dim(input)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or not is_turned(input):
            return super().forward(input)
        if has_kernel(self, input):
            return normalised(self, input)
        turned = input.movedim(0, -1)
        flat = super().forward(turned.reshape(1, input.shape[1], -1))
        return flat.reshape(turned.shape).movedim(-1, 0)


KEEPING = {
    nn.MaxPool2d: BatchLastMaxPool2d,
    nn.AvgPool2d: BatchLastAvgPool2d,
    nn.AdaptiveAvgPool2d: BatchLastAdaptiveAvgPool2d,
    nn.BatchNorm2d: BatchLastBatchNorm2d,
}


def keeping(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that computes what `module` does and keeps the memory order, if there is one."""
    if isinstance(module, nn.MaxPool2d) and module.return_indices:
        return None
    return KEEPING.get(type(module))


def keep_order(model: nn.Module) -> None:
    """Make pooling and batch norms of `model` keep the memory order of their inputs; its parameters stay.

    An nn.Sequential computes neighbours together, where there are some that can be.
    """
    for module in model.modules():
        module.__class__ = keeping(module) or row_for(module) or type(module)


def forget_order(model: nn.Module) -> None:
    """Undo `keep_order`."""
    plain = {turned: kind for kind, turned in KEEPING.items()}
    for module in model.modules():
        kind: type = module.plain if isinstance(module, Row) else plain.get(type(module), type(module))
        module.__class__ = kind


def trained_to_dense(model: nn.Module) -> None:
    """Turn a model that was trained on sparse kernels into one of torch's own layers, in place and zeros included."""
    for module in list(model.modules()):
        if isinstance(module, Trained):
            module.end()
    forget_order(model)


class PlainOrder:
    """A sparse layer whose output is in plain memory order, for models that call `.view()` on it."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        return to_batch_first(y) if y.dim() in (2, 4) and unobserved(y) else y.contiguous()


class PlainConv2d(PlainOrder, SparseConv2d):
    """SparseConv2d with its output in plain memory order."""


class PlainLinear(PlainOrder, SparseLinear):
    """SparseLinear with its output in plain memory order."""


PLAIN: dict[type, type] = {SparseConv2d: PlainConv2d, SparseLinear: PlainLinear}


def in_plain_order(layer: SparseModule) -> SparseModule:
    """Return a layer with the weights of `layer` whose output is in plain memory order."""
    layer = copy.copy(layer)
    layer.__class__ = PLAIN.get(type(layer), type(layer))
    return layer
