"""Batch norms and ReLUs that a layer takes over, and the changes of a model that put sparse layers in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sparselearning.sparse import ops
from sparselearning.sparse.batch_last import in_plain_order
from sparselearning.sparse.changes import Change, Swaps
from sparselearning.sparse.dataflow import Dataflow
from sparselearning.sparse.modules import SparseConv2d, SparseLinear, SparseModule
from sparselearning.sparse.report import LayerReport, is_plain

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
Layer = nn.Linear | nn.Conv2d


def followers(layer: Layer, flow: Dataflow) -> tuple[nn.Module | None, nn.Module | None]:
    """Return the batch norm, and the ReLU, that `layer` can take over; None for each that there is not."""
    norm, reader = None, flow.only_reader(layer)
    if reader is not None and can_fold(layer, reader, flow):
        norm, reader = reader, flow.only_reader(reader)
    return norm, reader if reader is not None and type(reader) is nn.ReLU and is_plain(reader) else None


def can_fold(layer: Layer, norm: nn.Module, flow: Dataflow) -> bool:
    """Return whether `norm` is a batch norm with fixed statistics over the outputs of `layer`."""
    if not fixed(norm, flow) or layer in flow.read_elsewhere:
        return False
    dims = 4 if isinstance(layer, nn.Conv2d) else 2  # a linear layer's last dimension is the norm's only in two
    return len(flow.inputs[norm].shape) == dims


def fixed(module: nn.Module, flow: Dataflow) -> bool:
    """Return whether `module` is a batch norm that computes the same affine function at every call."""
    if type(module) not in NORMS or not is_plain(module) or module not in flow.inputs:
        return False
    assert isinstance(module, NORMS)
    return module.running_mean is not None and not module.training and module not in flow.read_elsewhere


def folded(layer: Layer, norm: nn.Module | None) -> Layer:
    """Return the layer with `norm` in its weight and bias, or the layer itself without a norm."""
    if norm is None:
        return layer
    fuse = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
    fused = fuse(layer, norm)  # pyright: ignore[reportArgumentType]
    fused.register_parameter("bias", nn.Parameter(torch.as_tensor(fused.bias).detach()))
    return fused


def sparse_form(layer: Layer) -> SparseModule:
    return SparseConv2d.from_dense(layer) if isinstance(layer, nn.Conv2d) else SparseLinear.from_dense(layer)


def sparse_change(report: LayerReport, layer: Layer, sparse: SparseModule, norm, relu) -> Change:
    """Return the change of `layer` into `sparse`, which takes over `norm` and `relu`, and simpler ways."""
    taken = [(module, nn.Identity()) for module in (norm, relu) if module is not None]
    ways: list[tuple[str, Callable[[], Swaps]]] = [
        ("", lambda: [(layer, sparse), *taken]),
        ("its outputs are put in plain memory order", lambda: [(layer, in_plain_order(sparse)), *taken]),
    ]
    if taken:
        alone = copy.copy(layer)  # what `layer` is before it becomes sparse
        ways.append(("the norm and ReLU after it stay", lambda: [(layer, in_plain_order(sparse_form(alone)))]))
    return Change(report.name, ways, report)


class Affine(nn.Module):
    """A batch normalisation with fixed statistics, and the ReLU after it: act(x * scale + shift) per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm, relu: bool):
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps) * (norm.weight.detach() if norm.affine else 1)
        shift = (norm.bias.detach() if norm.affine else 0) - norm.running_mean * scale
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return ops.run("affine", x, self.scale, self.shift, self.relu)


def affine_changes(model: nn.Module, flow: Dataflow, taken: set[nn.Module]) -> list[Change]:
    """Return the changes of batch norms that no layer takes over into affine functions that keep the memory order."""
    changes = []
    for name, norm in model.named_modules():
        if norm in taken or not fixed(norm, flow):
            continue
        assert isinstance(norm, NORMS)
        relu = flow.only_reader(norm)
        if relu is None or type(relu) is not nn.ReLU or not is_plain(relu) or relu in taken:
            relu = None
        affine = Affine(norm, relu is not None)
        swaps: Swaps = [(norm, affine), *([(relu, nn.Identity())] if relu is not None else [])]
        changes.append(Change.one_way(name, swaps))
    return changes
