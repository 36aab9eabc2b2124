"""Turn a trained sparse model into one that runs faster because of its zeros."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparselearning.sparse.arguments import numeric_padding
from sparselearning.sparse.batch_last import keeping, trained_to_dense
from sparselearning.sparse.changes import Change, make, replace
from sparselearning.sparse.dataflow import Dataflow, Seen
from sparselearning.sparse.folding import Affine, Layer, affine_changes, folded, followers, sparse_change, sparse_form
from sparselearning.sparse.gpu import convert_pattern
from sparselearning.sparse.interface import DTYPES, available
from sparselearning.sparse.memory_order import in_order, is_batch_last
from sparselearning.sparse.modules import SparseModule
from sparselearning.sparse.report import LayerReport, Report, density_of, layers_of, others_of
from sparselearning.sparse.tracing import keep_example
from sparselearning.sparse.trees import alone, copied, fresh, own_copy
from sparselearning.sparse.verification import Verifier

__all__ = ["Affine", "compare", "convert", "replace"]

logger = logging.getLogger(__name__)

SECONDS_PER_LAYER = 0.05
NAN = math.nan


def convert(model: nn.Module, example_input: Any, layout: str = "unstructured") -> tuple[nn.Module, Report]:
    """Return a copy of `model` for inference that computes the same and is no slower, and a report on its layers.

    The function runs copies of the model on `example_input`: a tensor, a tuple of arguments, or a dict of keyword
    arguments. It measures each nn.Linear and nn.Conv2d on an input like the one that it sees. A layer becomes sparse if
    that is faster. Batch normalisation and ReLU after a layer are folded into it. Then the outputs are compared with
    those of the dense model, on the example and on a second input: what makes them differ or raises stays dense, and
    the report says so. Times depend on the batch, so pass an example of the batch size to be served, and call
    `torch.set_num_threads` first. `save` takes the example
    too, which is kept as long as the model. Layers without zeros stay dense, and so do models that are not on a CPU.

    layout: 'unstructured' for the kernels of this package; '2:4' or 'bsr' for masks of that pattern on a GPU.

    Raises:
        TypeError: if the model cannot be copied.
        ValueError: if lazy layers have no weights yet.
    """
    if layout != "unstructured":
        return convert_pattern(model, example_input, layout)
    fast, report = converted(model, example_input)
    keep_example(fast, example_input)
    return fast, report


def converted(model: nn.Module, example_input: Any) -> tuple[nn.Module, Report]:
    """Return what `convert` returns."""
    with alone():
        dense = own_copy(model)
        trained_to_dense(dense)
        device = next((p.device.type for p in dense.parameters()), "cpu")
        if not available() or device != "cpu":
            why = f"on a {device} unstructured weights stay dense" if available() else "built without sparse kernels"
            logger.warning("convert leaves the model as it is: %s.", why)
            return dense, Report(verified=f"not verified: {why}")
        verifier = Verifier(dense, example_input)
        if verifier.refused:
            return dense, stay_dense(dense, verifier.verified)
        return convert_verified(dense, verifier)


def stay_dense(dense: nn.Module, why: str) -> Report:
    """Return the report on a model whose outputs cannot be compared."""
    logger.warning("convert leaves the model as it is, %s.", why)
    return Report([kept(name, layer, "the model cannot be verified") for name, layer in layers_of(dense)], verified=why)


def convert_verified(dense: nn.Module, verifier: Verifier) -> tuple[nn.Module, Report]:
    """Return the converted copy of `dense` and its report."""
    holder = copied(dense, "a model")
    report, changes = plan(holder, verifier)
    for note in make(holder, changes, verifier):
        report.notes.append(note)
    report.verified = verifier.verified if changes else report.verified
    args, kwargs = copied(verifier.example)
    timed = fresh(dense), fresh(holder)
    try:
        report.dense_ms, report.converted_ms = compare([lambda model=model: model(*args, **kwargs) for model in timed])
    except Exception as error:  # a model that fills up, for example
        why = f"its time was not measured: it raises {type(error).__name__} when it runs again and again"
        return dense, undone(report, why)
    if report.converted_ms > report.dense_ms:
        return dense, undone(report, "no gain in the whole model")
    for module in holder.modules():
        if isinstance(module, SparseModule):
            module.serve()
    return holder, report


def undone(report: Report, why: str) -> Report:
    """Return the report on a model that stays dense after all."""
    for layer in report.layers:
        layer.note = why if layer.replaced else layer.note or why
        layer.replaced = False
    return report


def plan(model: nn.Module, verifier: Verifier) -> tuple[Report, list[Change]]:
    """Measure every layer; return a report and the changes that make the model faster."""
    flow = Dataflow(model, verifier.example)
    places = {module: place for place, module in enumerate(model.modules())}
    report, changes = Report(), []
    taken: set[nn.Module] = set()
    for name, layer in layers_of(model):
        if why := why_dense(layer, flow, verifier.calls[places[layer]]):
            report.layers.append(kept(name, layer, why))
            continue
        norm, relu = followers(layer, flow)
        fused = folded(layer, norm)
        entry, sparse = try_sparse(name, fused, flow.inputs[layer], relu)
        entry.density = density_of(layer)
        report.layers.append(entry)
        if entry.replaced and sparse is not None:
            changes.append(sparse_change(entry, layer, sparse, norm, relu))
            taken |= {module for module in (norm, relu) if module is not None}
        elif norm is not None:
            changes.append(Change.one_way(name, [(layer, fused), (norm, nn.Identity())]))
            taken.add(norm)
    report.layers += [kept(name, layer, why) for name, layer, why in others_of(model)]
    names = {name: place for place, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: names[layer.name])
    if any(layer.replaced for layer in report.layers):
        affine = affine_changes(model, flow, taken)
        taken |= {module for change in affine for module, _ in change.swaps(0)}
        changes += [*affine, *order_changes(model, taken)]
    return report, changes


def kept(name: str, layer: nn.Module, why: str) -> LayerReport:
    return LayerReport(name, density_of(layer), NAN, NAN, False, why)


def why_dense(layer: Layer, flow: Dataflow, calls: int) -> str:
    """Return why the way in which the model uses a layer keeps it dense; empty if it does not."""
    if layer in flow.read_elsewhere:
        return "its weight is read outside of the layer"
    if layer not in flow.inputs:
        return "not called on the example"
    if calls != flow.calls[layer]:  # torch takes its fast paths when nobody watches
        return "a fast path reads its weight"
    return ""


def try_sparse(name: str, layer: Layer, seen: Seen, relu: nn.Module | None) -> tuple[LayerReport, SparseModule | None]:
    """Measure `layer` dense and sparse on an input like `seen`; return a report, and its sparse form if it has one."""
    density = density_of(layer)
    dtype, device = layer.weight.dtype, layer.weight.device.type
    try:
        if isinstance(layer, nn.Conv2d):
            numeric_padding(layer)
        if density == 1:
            return kept(name, layer, "no zeros"), None
        if seen.dtype not in DTYPES or dtype != seen.dtype or device != "cpu":
            return kept(name, layer, f"no kernels for {seen.dtype} with weights of {dtype} on {device}"), None
        sparse = sparse_form(layer)
        sparse.relu = relu is not None
        dense_ms, sparse_ms = measure(layer, sparse, seen, relu)
    except (ValueError, RuntimeError, TypeError) as error:
        return kept(name, layer, str(error)), None
    return LayerReport(name, density, dense_ms, sparse_ms, sparse_ms < dense_ms), sparse


def measure(layer: Layer, sparse: SparseModule, seen: Seen, relu: nn.Module | None) -> tuple[float, float]:
    """Return the milliseconds of a call, dense (the faster of two memory orders) and sparse."""
    x = torch.ones(seen.shape, dtype=seen.dtype)
    ready = x if x.dim() in (1, 3) else in_order(x, is_batch_last(len(x)))
    after = relu or nn.Identity()
    choices = [lambda: after(layer(x)), lambda: sparse(ready)]
    if x.dim() == 4:
        turned, x_turned = copy.deepcopy(layer), x.to(memory_format=torch.channels_last)
        nn.Module.to(turned, memory_format=torch.channels_last)
        choices.append(lambda: after(turned(x_turned)))
    dense_ms, sparse_ms, *others = compare(choices)
    return min(dense_ms, *others) if others else dense_ms, sparse_ms


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


def order_changes(model: nn.Module, taken: set[nn.Module]) -> list[Change]:
    """Return the changes of pooling and other batch norms into layers that keep the memory order of their inputs."""
    changes = []
    for name, module in model.named_modules():
        kind = keeping(module)
        if kind is not None and module not in taken:
            turned = copy.copy(module)
            turned.__class__ = kind
            changes.append(Change.one_way(name, [(module, turned)]))
    return changes
