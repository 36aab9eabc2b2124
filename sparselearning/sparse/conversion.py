"""Turn a trained sparse model into one that runs faster because of its zeros."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from typing import Any

import torch
from torch import nn

from sparselearning.sparse import in_place
from sparselearning.sparse.arguments import numeric_padding
from sparselearning.sparse.batch_last import keeping, trained_to_dense
from sparselearning.sparse.changes import Change, apply, choose, noted, replace
from sparselearning.sparse.dataflow import Dataflow, Seen
from sparselearning.sparse.deciding import CHANNELS_LAST, DENSE, SPARSE, WHOLE_MARGIN, Candidate, Trial, decide
from sparselearning.sparse.folding import Affine, Layer, affine_changes, folded, followers, sparse_change, sparse_form
from sparselearning.sparse.gpu import convert_pattern
from sparselearning.sparse.interface import DTYPES, available
from sparselearning.sparse.memory_order import is_batch_last
from sparselearning.sparse.modules import SparseModule
from sparselearning.sparse.pointwise import PointwiseConv2d
from sparselearning.sparse.progress import Show, progress_line
from sparselearning.sparse.report import LayerReport, Report, density_of, layers_of, others_of
from sparselearning.sparse.tracing import keep_example
from sparselearning.sparse.trees import alone, copied, fresh, own_copy
from sparselearning.sparse.verification import Verifier, difference, run

__all__ = ["Affine", "convert", "replace"]

logger = logging.getLogger(__name__)

SECONDS_PER_LAYER = 0.05
SECONDS_COMPILED = 1.0
FEW_WEIGHTS = 1 << 16  # of a convolution without zeros that may be sparse too, to keep the memory order
NAN = math.nan


def convert(
    model: nn.Module,
    example_input: Any,
    layout: str = "unstructured",
    *,
    progress: bool | None = None,
    seconds: float | None = None,
    compiled: bool = False,
) -> tuple[nn.Module, Report]:
    """Return a copy of `model` for inference that computes the same and is no slower, and a report on its layers.

    The function runs copies of the model on `example_input`: a tensor, a tuple of arguments, or a dict of keyword
    arguments. It times each nn.Linear and nn.Conv2d in the model, dense and sparse, and tries what is in doubt in the
    whole model. A layer becomes sparse if the model is faster with it. Batch normalisation and ReLU after a layer are
    folded into it. The fastest model is compared with the dense one, in time and in outputs, on the example and on a
    second input: what makes them differ or raises stays dense, and the report says so. Times depend on the batch, so
    pass an example of the batch size to be served, and call `torch.set_num_threads` first. `save` takes the example
    too, which is kept as long as the model. Layers without zeros stay dense, except small convolutions beside sparse
    ones, whose memory order may matter more; and so do models that are not on a CPU.

    layout: 'unstructured' for the kernels of this package; '2:4' or 'bsr' for masks of that pattern on a GPU.
    progress: whether to draw a bar on stderr; None for where it is a terminal.
    seconds: about how long to time, 0.05 a layer if None. Each model is run twice at the least, and the runs that
        compare outputs come on top.
    compiled: whether to compare with the dense model after torch.compile too, which takes a minute or more, and to
        return that if it is the fastest.

    Raises:
        TypeError: if the model cannot be copied.
        ValueError: if lazy layers have no weights yet, or for negative seconds.
    """
    if layout != "unstructured":
        return convert_pattern(model, example_input, layout)
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"Expected seconds >= 0 to time the model for, got {seconds}. Pass None for 0.05 a layer.")
    with alone(), progress_line("convert", progress) as show:
        fast, report = converted(model, example_input, seconds, compiled, show)
        show(1.0, "done")
    keep_example(fast, example_input)
    return fast, report


def converted(model: nn.Module, example_input: Any, seconds, compiled: bool, show: Show) -> tuple[nn.Module, Report]:
    """Return what `convert` returns; `show` is told the share that is done, and what comes now."""
    dense = own_copy(model)
    trained_to_dense(dense)
    device = next((p.device.type for p in dense.parameters()), "cpu")
    if not available() or device != "cpu":
        why = f"on a {device} unstructured weights stay dense" if available() else "built without sparse kernels"
        logger.warning("convert leaves the model as it is: %s.", why)
        return dense, Report(verified=f"not verified: {why}")
    show(0.0, "running the dense model")
    verifier = Verifier(dense, example_input)
    if verifier.refused:
        return dense, stay_dense(dense, verifier.verified)
    fast, report = convert_verified(dense, verifier, seconds, show)
    if compiled:
        show(0.9, "compiling the dense model")
        fast = or_compiled(fast, dense, verifier, report)
    return fast, report


def stay_dense(dense: nn.Module, why: str) -> Report:
    """Return the report on a model whose outputs cannot be compared."""
    logger.warning("convert leaves the model as it is, %s.", why)
    return Report([kept(name, layer, "the model cannot be verified") for name, layer in layers_of(dense)], verified=why)


def convert_verified(
    dense: nn.Module, verifier: Verifier, seconds: float | None, show: Show
) -> tuple[nn.Module, Report]:
    """Return the converted copy of `dense` and its report."""
    holder = copied(dense, "a model")
    report, trial = plan(holder, verifier)
    if seconds is None:
        seconds = SECONDS_PER_LAYER * len(trial.candidates)
    if not any(SPARSE in candidate.changes for candidate in trial.candidates):
        return dense, report
    try:
        try:
            decision = decide(trial, seconds, lambda done, what: show(0.25 + 0.6 * done, what))
        except Exception:  # a sparse form that the model does not bear: find which, then decide among the others
            report.notes += keep_borne(trial, verifier)
            decision = decide(trial, seconds, lambda done, what: show(0.25 + 0.6 * done, what))
        report.dense_ms, report.converted_ms = decision.dense_ms, decision.converted_ms
        if decision.forms is None:
            return dense, undone(report, "no gain in the whole model")
        show(0.85, "comparing outputs")
        accepted, rejected = choose(holder, decision.changes, verifier)
        apply(accepted)
        report.notes += noted(decision.changes, accepted, rejected)
        report.verified = verifier.verified if accepted else report.verified
        if len(accepted) < len(decision.changes) or any(choice.way for choice in accepted):
            times = in_place.time_in_turns([fresh(dense), fresh(holder)], [], verifier.example, seconds / 4)
            report.dense_ms, report.converted_ms = (statistics.median(each.whole) for each in times)
            if report.converted_ms > report.dense_ms:
                return dense, undone(report, "no gain in the whole model")
    except Exception as error:  # a model that fills up, for example
        why = f"its time was not measured: it raises {type(error).__name__} when it runs again and again"
        return dense, undone(report, why)
    for layer in report.layers:
        if not layer.replaced and not layer.note and SPARSE not in decision.forms.values():
            layer.note = "no gain in the whole model"
    for module in holder.modules():
        if isinstance(module, SparseModule):
            module.serve()
    return holder, report


def keep_borne(trial: Trial, verifier: Verifier) -> list[str]:
    """Leave to `trial` the forms with which the outputs stay the same, the sparse ones in the way that does so.

    Returns notes on what else stays as it was.
    """
    if verifier.difference(trial.copy_in(trial.uniform(CHANNELS_LAST))):  # a model that calls .view(), for example
        for candidate in trial.candidates:
            candidate.changes.pop(CHANNELS_LAST, None)
    changes = trial.changes(trial.uniform(SPARSE))
    accepted, rejected = choose(trial.model, changes, verifier)
    notes = noted(changes, accepted, rejected)
    ways = {choice.change: choice.way for choice in accepted}
    trial.extras = [change for change in trial.extras if change in ways]
    for candidate in trial.candidates:
        sparse = candidate.changes.get(SPARSE)
        if sparse is None:
            continue
        if sparse not in ways:
            del candidate.changes[SPARSE]
            continue
        (_, swaps), *simpler = sparse.ways[ways[sparse] :]
        candidate.changes[SPARSE] = Change(sparse.name, [(candidate.entry.note, swaps), *simpler], sparse.report)
        candidate.entry.note, candidate.entry.replaced = "", False
    return notes


def or_compiled(converted: nn.Module, dense: nn.Module, verifier: Verifier, report: Report) -> nn.Module:
    """Return `converted`, or the dense model after torch.compile if that is faster and computes the same."""
    turned = nn.Module.to(copied(dense), memory_format=torch.channels_last)
    quick: Any = torch.compile(turned)
    expected = verifier.expected["the example"][1]
    if difference(expected, run(quick, verifier.example)):
        report.notes.append("torch.compile changes the outputs of the dense model")
        return converted
    one, other = in_place.time_in_turns([fresh(converted), quick], [], verifier.example, SECONDS_COMPILED)
    if statistics.median(other.whole) > (1 - WHOLE_MARGIN) * statistics.median(one.whole):
        return converted
    report.converted_ms = statistics.median(other.whole)
    undone(report, "the dense model is faster after torch.compile")
    return quick


def undone(report: Report, why: str) -> Report:
    """Return the report on a model that stays dense after all."""
    for layer in report.layers:
        layer.note = why if layer.replaced else layer.note or why
        layer.replaced = False
    return report


def plan(model: nn.Module, verifier: Verifier) -> tuple[Report, Trial]:
    """Find the forms that each layer can have; return a report on the layers and what tries them."""
    flow = Dataflow(model, verifier.example)
    places = {module: place for place, module in enumerate(model.modules())}
    report, candidates = Report(), []
    taken: set[nn.Module] = set()
    for name, layer in layers_of(model):
        if why := why_dense(layer, flow, verifier.calls[places[layer]]):
            report.layers.append(kept(name, layer, why))
            continue
        norm, relu = followers(layer, flow)
        fused = folded(layer, norm)
        entry, sparse = sparse_of(name, fused, flow.inputs[layer], relu)
        entry.density = density_of(layer)
        report.layers.append(entry)
        pointwise = PointwiseConv2d.of(fused, relu is not None)
        changes = dense_changes(name, layer, fused, norm, flow.inputs[layer])
        if pointwise is not None:
            followed = [(module, nn.Identity()) for module in (norm, relu) if module is not None]
            changes[DENSE] = Change.one_way(name, [(layer, pointwise), *followed])
        if sparse is not None:
            changes[SPARSE] = sparse_change(entry, layer, sparse, norm, relu)
        keeps = pointwise is not None and is_batch_last(flow.inputs[layer].shape[0])
        candidates.append(Candidate(places[layer], entry, changes, keeps))
        taken |= {module for module in (norm, relu if sparse is not None else None) if module is not None}
    report.layers += [kept(name, layer, why) for name, layer, why in others_of(model)]
    names = {name: place for place, (name, _) in enumerate(model.named_modules())}
    report.layers.sort(key=lambda layer: names[layer.name])
    affine = affine_changes(model, flow, taken)
    taken |= {module for change in affine for module, _ in change.swaps(0)}
    return report, Trial(model, candidates, [*affine, *order_changes(model, taken)], verifier.example)


def dense_changes(name: str, layer: Layer, fused: Layer, norm: nn.Module | None, seen: Seen) -> dict[int, Change]:
    """Return the changes of a layer into its dense forms, which take over `norm`."""
    own = [(norm, nn.Identity())] if norm is not None else []
    changes = {DENSE: Change.one_way(name, [(layer, fused), *own] if own else [])}
    if isinstance(layer, nn.Conv2d) and len(seen.shape) == 4:
        turned = copy.deepcopy(fused)
        nn.Module.to(turned, memory_format=torch.channels_last)
        changes[CHANNELS_LAST] = Change.one_way(name, [(layer, turned), *own])
    return changes


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


def sparse_of(name: str, layer: Layer, seen: Seen, relu: nn.Module | None) -> tuple[LayerReport, SparseModule | None]:
    """Return a report on `layer`, and its sparse form with a ReLU after it if there is `relu`; None if it has none."""
    density = density_of(layer)
    dtype, device = layer.weight.dtype, layer.weight.device.type
    try:
        if isinstance(layer, nn.Conv2d):
            numeric_padding(layer)
        if density == 1 and not (isinstance(layer, nn.Conv2d) and layer.weight.numel() <= FEW_WEIGHTS):
            return kept(name, layer, "no zeros"), None
        if seen.dtype not in DTYPES or dtype != seen.dtype or device != "cpu":
            return kept(name, layer, f"no kernels for {seen.dtype} with weights of {dtype} on {device}"), None
        sparse = sparse_form(layer)
        sparse.relu = relu is not None
    except (ValueError, RuntimeError, TypeError) as error:
        return kept(name, layer, str(error)), None
    return LayerReport(name, density, NAN, NAN, False), sparse


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
