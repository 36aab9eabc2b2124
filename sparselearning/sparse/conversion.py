"""Turn a trained sparse model into one that runs faster because of its zeros."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sparselearning.sparse import ops
from sparselearning.sparse.batch_last import keep_order
from sparselearning.sparse.dataflow import Dataflow, Seen
from sparselearning.sparse.gpu import convert_pattern
from sparselearning.sparse.interface import DTYPES, available
from sparselearning.sparse.memory_order import in_order, is_batch_last
from sparselearning.sparse.modules import SparseConv2d, SparseLinear, SparseModule
from sparselearning.sparse.report import LayerReport, Report, layers_of
from sparselearning.sparse.trained import trained_to_dense

logger = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SECONDS_PER_LAYER = 0.05


def convert(model: nn.Module, example_input: Any, layout: str = "unstructured") -> tuple[nn.Module, Report]:
    """Return a copy of `model` for inference that is no slower, and a report on its layers.

    The function runs the model on `example_input` (a tensor, or a tuple of arguments) and measures each nn.Linear and
    nn.Conv2d on an input like the one that it sees. A layer becomes sparse if that is faster. Batch normalisation and
    ReLU after a layer are folded into it. Times depend on the batch, so pass an example of the batch size to be
    served, and call `torch.set_num_threads` first. Layers without zeros stay dense, and so do models that are not on a
    CPU.

    layout: 'unstructured' for the kernels of this package; '2:4' or 'bsr' for masks of that pattern on a GPU.
    """
    if layout != "unstructured":
        return convert_pattern(model, layout)
    device = next((p.device.type for p in model.parameters()), "cpu")
    dense = copy.deepcopy(model).eval()
    trained_to_dense(dense)
    report = Report()
    if not available() or device != "cpu":
        why = f"on a {device} unstructured weights stay dense" if available() else "built without sparse kernels"
        logger.warning("convert leaves the model as it is: %s.", why)
        return dense, report
    holder = nn.Sequential(copy.deepcopy(dense))
    flow = Dataflow(holder, example_input)
    fused = fold_norms(holder, flow)
    for name, layer in layers_of(holder):
        if layer in flow.inputs:
            entry, sparse = try_sparse(name.removeprefix("0."), layer, flow.inputs[layer], fused.get(layer))
            report.layers.append(entry)
            if entry.replaced and sparse is not None:
                replace(holder, layer, sparse)
                if layer in fused:
                    replace(holder, fused[layer], nn.Identity())
    if any(layer.replaced for layer in report.layers):
        follow_layout(holder, flow)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    report.dense_ms, report.converted_ms = compare([lambda: dense(*arguments), lambda: holder(*arguments)])
    if report.converted_ms > report.dense_ms:
        for layer in report.layers:
            layer.replaced, layer.note = False, layer.note or "no gain in the whole model"
        return dense, report
    return holder[0], report


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def fold_norms(model: nn.Module, flow: Dataflow) -> dict[nn.Module, nn.Module]:
    """Fold batch norms into the layers before them, in place; return the ReLU that follows each layer, if any."""
    relus = {}
    for _, layer in layers_of(model):
        reader = flow.only_reader(layer)
        if isinstance(reader, NORMS) and reader.running_mean is not None:
            is_conv = isinstance(layer, nn.Conv2d)
            folded = fuse_conv_bn_eval(layer, reader) if is_conv else fuse_linear_bn_eval(layer, reader)
            layer.weight = folded.weight
            layer.register_parameter("bias", nn.Parameter(torch.as_tensor(folded.bias).detach()))
            replace(model, reader, nn.Identity())
            reader = flow.only_reader(reader)
        if isinstance(reader, nn.ReLU):
            relus[layer] = reader
    return relus


def sparse_form(layer: nn.Linear | nn.Conv2d) -> SparseModule:
    return SparseConv2d.from_dense(layer) if isinstance(layer, nn.Conv2d) else SparseLinear.from_dense(layer)


def try_sparse(name, layer, seen: Seen, relu) -> tuple[LayerReport, SparseModule | None]:
    """Measure `layer` dense and sparse on an input like `seen`; return a report, and its sparse form if it has one."""
    nan = float("nan")
    density = layer.weight.detach().count_nonzero().item() / layer.weight.numel()
    try:
        sparse = sparse_form(layer)
    except ValueError as error:
        return LayerReport(name, density, nan, nan, False, str(error)), None
    if density == 1 or seen.dtype not in DTYPES:
        note = "no zeros" if density == 1 else f"no kernels for {seen.dtype}"
        return LayerReport(name, density, nan, nan, False, note), None
    sparse.relu = relu is not None
    x = torch.ones(seen.shape, dtype=seen.dtype)
    ready = x if x.dim() == 3 else in_order(x, is_batch_last(len(x)))
    after = relu or nn.Identity()
    choices = [lambda: after(layer(x)), lambda: sparse(ready)]
    if x.dim() == 4:
        turned, x_turned = copy.deepcopy(layer), x.to(memory_format=torch.channels_last)
        nn.Module.to(turned, memory_format=torch.channels_last)
        choices.append(lambda: after(turned(x_turned)))
    dense_ms, sparse_ms, *others = compare(choices)
    dense_ms = min(dense_ms, *others) if others else dense_ms
    return LayerReport(name, density, dense_ms, sparse_ms, sparse_ms < dense_ms), sparse


@torch.no_grad()
def compare(choices: list[Callable[[], Any]], seconds: float = SECONDS_PER_LAYER) -> list[float]:
    """Return the median milliseconds of each choice. The choices take turns, so disturbances affect all of them."""
    times: list[list[float]] = [[] for _ in choices]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, record in zip(choices, times, strict=True):
            call()
            start = time.perf_counter()
            call()
            record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(record) for record in times]


def follow_layout(model: nn.Module, flow: Dataflow) -> None:
    """Make batch norms and pooling between sparse layers keep the memory order of those layers."""
    for module in list(model.modules()):
        if isinstance(module, NORMS) and module.running_mean is not None and module in flow.inputs:
            reader = flow.only_reader(module)
            replace(model, module, Affine(module, isinstance(reader, nn.ReLU)))
            if isinstance(reader, nn.ReLU):
                replace(model, reader, nn.Identity())
    keep_order(model)


class Affine(nn.Module):
    """A batch normalisation with fixed statistics, and the ReLU after it: act(x * scale + shift) per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, relu: bool):
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
