"""What a Masking says of itself: a line, a table of its layers, and counts in the log."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from sparselearning.budgets import layers_of
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.maskable import judge, usual_exceptions
from sparselearning.start.masks import Density
from sparselearning.start.names import by_density, named
from sparselearning.start.parametrized import REFUSED
from sparselearning.weights.frozen import is_frozen
from sparselearning.weights.optimizer import torch_optimizer

logger = logging.getLogger(__name__)

PARAMETERS = "{:{width}}  {:>18}  {:>12}  {:>6}  {}"
COLUMNS = "{:{width}}  {:>18}  {:>10}  {:>10}  {:>7}  {:>10}  {}"


def in_one_line(masking: Any) -> str:
    """Return modes, counts and density in one line."""
    modes = dict(prune=masking.prune_mode, redistribution=masking.redistribution_mode, growth=masking.growth_mode)
    settings = [f"{kind}={getattr(mode, '__name__', mode)!r}" for kind, mode in modes.items()]
    size, number = masking.total_nonzero + masking.total_zero, len(masking.layers)
    counts = f"{masking.total_nonzero} of {size} weights active, density {masking.density:.4g}"
    layers = f"{number} layer{'' if number == 1 else 's'}"
    return f"Masking({', '.join(settings)}, weights={masking.held.kind!r}, {layers}, {counts})"


def summary(masking: Any) -> str:
    """Return a table of the masked layers, their sums, and the parameters that stay dense, with the reason.

    Where patterns of names have densities of their own, there is a sum for each. Importance is a layer's share in the
    last update, of all layers or of those of its pattern; a note says how a weight is held, where not by zeros, and
    what is suspicious: one or two outputs or inputs, outputs without inputs, inputs that no output reads.
    """
    budgets = {f"all of {budget.pattern!r}": budget for budget in masking.budgets if len(masking.budgets) > 1}
    names = [*masking.densities, *masking.kept_dense, *budgets, "masked weights"]
    width = max(map(len, names))
    rows = [COLUMNS.format("layer", "shape", "active", "of", "density", "importance", "note", width=width)]
    for layer in masking.layers:
        counts = (_shape(layer.mask), layer.nonzeros, layer.size, f"{layer.density:.4f}")
        notes = [] if layer.pattern.name == "unstructured" else [layer.pattern.name]
        notes += [note for note in [masking.held.describe(layer), *_found(layer)] if note]
        rows.append(
            COLUMNS.format(layer.name, *counts, f"{layer.importance:.4f}", ", ".join(notes), width=width).rstrip()
        )
    sums = {name: layers_of(budget, masking.layers) for name, budget in budgets.items()}
    for name, layers in (sums | {"masked weights": masking.layers}).items():
        active, size = sum(layer.nonzeros for layer in layers), sum(layer.size for layer in layers)
        total = ("", active, size, f"{active / max(size, 1):.4f}", "", "")
        rows.append(COLUMNS.format(name, *total, width=width).rstrip())
    for name, (parameter, reason) in masking.kept_dense.items():
        dense = (_shape(parameter), parameter.numel(), parameter.numel(), "dense", "", reason)
        rows.append(COLUMNS.format(name, *dense, width=width))
    return "\n".join(rows)


def metrics(masking: Any) -> dict[str, float]:
    """Return numbers for any logger: of the network, and density and importance of each layer, by its name.

        wandb.log({f"sparse/{name}": number for name, number in masking.metrics().items()}, step=masking.steps)

    `removed_weights` and importance are those of the last update. Call it after an update, or once an epoch.
    """
    numbers: dict[str, float] = dict(
        steps=masking.steps,
        density=masking.density,
        active_weights=masking.total_nonzero,
        inactive_weights=masking.total_zero,
        removed_weights=masking.total_removed,
        prune_rate=masking.prune_rate,
        exploration_rate=masking.exploration_rate,
    )
    for layer in masking.layers:
        numbers |= {f"density/{layer.name}": layer.density, f"importance/{layer.name}": layer.importance}
    return numbers


def describe(
    model: nn.Module,
    optimizer: Any = None,
    density: Density = 0.05,
    sparse: Iterable[str] = (),
    dense: Iterable[str] = (),
    sparse_embeddings: bool = False,
) -> str:
    """Return a table of every parameter of a model: masked or dense, and why; nothing is changed.

    A note says what to look at before training: layers of one or two outputs or inputs, or of less than one active
    weight, outputs that are likely to lose all their inputs at this density, and inputs that no output is likely to
    read. What add_module would refuse is marked. The other arguments are those of `add_module`.

    Raises:
        ValueError: as `add_module`, for patterns that match nothing and for densities.
    """
    judged = list(judge(model, sparse_embeddings, sparse))
    reasons = _why_dense(model, optimizer, judged, dense)
    sizes = {found.name: found.parameter.numel() for found in judged if not reasons[found.name]}
    groups = by_density(list(sizes), density)
    densities = {name: part for _, part, names in groups for name in names}
    active = sum(round(part * sum(sizes[name] for name in names)) for _, part, names in groups)
    width = max((len(found.name) for found in judged), default=0)
    rows = [PARAMETERS.format("parameter", "shape", "number", "", "why, or what to look at", width=width)]
    for found in judged:
        name, parameter = found.name, found.parameter
        note = reasons[name] or "; ".join(_expected(found, densities[name]))
        kind = "dense" if reasons[name] else "masked"
        rows.append(PARAMETERS.format(name, _shape(parameter), parameter.numel(), kind, note, width=width).rstrip())
    total = sum(found.parameter.numel() for found in judged)
    asked = "these densities" if isinstance(density, Mapping) else f"density {density:g}"
    rows.append(f"{sum(sizes.values())} of {total} parameters are masked; at {asked}, {active} of them are active.")
    return "\n".join(rows)


def _why_dense(model, optimizer, judged, dense):
    """Return the name of each parameter -> why it stays dense, or an empty string."""
    weights = [found.name for found in judged if not found.reason or found.reason.startswith(REFUSED)]
    chosen = named(weights, dense, usual_exceptions(model))
    groups = [] if optimizer is None else torch_optimizer(optimizer).param_groups
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    reasons = {found.name: "named to stay dense" if found.name in chosen else found.reason for found in judged}
    if optimizer is not None:
        elsewhere = [found for found in judged if not reasons[found.name] and id(found.parameter) not in stepped]
        reasons |= {found.name: "the optimizer does not step it" for found in elsewhere}
    return reasons


def _expected(found, density):
    """Yield what is suspicious of a layer before its mask is drawn."""
    way, shape = found.orientation, found.parameter.shape
    yield from _small(way, shape)
    if density * math.prod(shape) < 0.5:
        yield f"less than one active weight at density {density:g}"
    outputs, inputs, *kernel = way.layer(shape)
    unread = way.copies * inputs * (1 - density) ** (outputs * math.prod(kernel))
    empty = 0 if found.norm_dim == 0 else way.copies * outputs * (1 - density) ** (inputs * math.prod(kernel))
    if empty >= 0.5:
        yield f"about {round(empty)} of {way.copies * outputs} outputs without inputs at density {density:g}"
    if unread >= 0.5:
        yield f"about {round(unread)} of {way.copies * inputs} inputs that no output reads at density {density:g}"


def _small(orientation, shape):
    outputs, inputs, *_ = orientation.layer(shape)
    for number, kind in ((outputs, "output"), (inputs, "input")):
        if number <= 2 and (kind == "output" or len(shape) == 2):
            yield f"{number} {kind}{'' if number == 1 else 's'}"


def _found(layer):
    """Yield what is suspicious of a layer that has its mask."""
    if is_frozen(layer):
        yield "frozen"
    yield from _small(layer.orientation, layer.shape)
    if is_sharded(layer.weight):
        return
    way = layer.orientation
    outputs, inputs, *_ = way.layer(layer.shape)
    empty, unread = layer.unconnected()
    if empty:
        yield f"{empty} of {way.copies * outputs} outputs without inputs"
    if unread:
        yield f"{unread} of {way.copies * inputs} inputs that no output reads"


def tell_of_epoch(masking: Any) -> None:
    """Warn if the optimizer has made no step since the last epoch; log how far the density has come."""
    if masking.layers and masking.steps == masking.steps_of_last_epoch:
        logger.warning(
            "%s has made no step since the last call of at_end_of_epoch (%d in all), or its hooks do not run. Make the "
            "Masking with the optimizer that trains the weights, or with the wrapper that is stepped.",
            type(masking.optimizer).__name__,
            masking.steps,
        )
    masking.steps_of_last_epoch = masking.steps
    if unfinished := density_to_come(masking):
        logger.info("%s", unfinished)


def density_to_come(masking: Any) -> str:
    """Return a sentence on a density that the schedule has not reached yet, or nothing if there is none."""
    end = masking.updates.ends_at()
    if end is None or not masking.layers:
        return ""
    density, size = masking.updates.density_at(end), masking.total_nonzero + masking.total_zero
    if isinstance(density, Mapping):  # of each budget
        ends = [density.get(layer.budget.pattern, layer.density) * layer.size for layer in masking.layers]
        density = sum(ends) / size
    if masking.total_nonzero <= 1.01 * density * size + len(masking.layers):
        return ""
    why = "no update has come since, or frozen layers keep theirs"
    return (
        f"The density is {masking.density:.4g} after {masking.steps} steps, and the schedule's is {density:.4g} from "
        f"step {end} on: {why if masking.steps >= end else 'train so long, or let it end earlier'}."
    )


def log_counts(masking: Any) -> None:
    """Log the active weights of every layer and of the network."""
    for line in lines_of_counts(masking):
        logger.info("%s", line)


def lines_of_counts(masking: Any) -> Iterator[str]:
    """Yield a line for each layer, and one for the network."""
    for layer in masking.layers:
        yield f"{layer.name}: {layer.nonzeros} of {layer.size} active, density {layer.density:.4f}"
    yield f"Prune rate: {masking.prune_rate:.4f}. Active weights: {masking.total_nonzero}."


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "1"
