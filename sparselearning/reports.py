"""What a Masking says of itself: a line, a table of its layers, and counts in the log."""

import logging
import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from sparselearning.layers import layers_of
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.maskable import judge, usual_exceptions
from sparselearning.start.names import named
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
    what is suspicious: one or two outputs or inputs, outputs without inputs.
    """
    budgets = {f"all of {budget.pattern!r}": budget for budget in masking.budgets if len(masking.budgets) > 1}
    names = [*masking.masks, *masking.kept_dense, *budgets, "masked weights"]
    width = max(map(len, names))
    rows = [COLUMNS.format("layer", "shape", "active", "of", "density", "importance", "note", width=width)]
    for layer in masking.layers:
        counts = (_shape(layer.mask), layer.nonzeros, layer.mask.numel(), f"{layer.density:.4f}")
        notes = [] if layer.pattern.name == "unstructured" else [layer.pattern.name]
        notes += [note for note in [masking.held.describe(layer), *_found(layer)] if note]
        rows.append(
            COLUMNS.format(layer.name, *counts, f"{layer.importance:.4f}", ", ".join(notes), width=width).rstrip()
        )
    sums = {name: layers_of(budget, masking.layers) for name, budget in budgets.items()}
    for name, layers in (sums | {"masked weights": masking.layers}).items():
        active, size = sum(layer.nonzeros for layer in layers), sum(layer.mask.numel() for layer in layers)
        total = ("", active, size, f"{active / max(size, 1):.4f}", "", "")
        rows.append(COLUMNS.format(name, *total, width=width).rstrip())
    for name, (parameter, reason) in masking.kept_dense.items():
        dense = (_shape(parameter), parameter.numel(), parameter.numel(), "dense", "", reason)
        rows.append(COLUMNS.format(name, *dense, width=width))
    return "\n".join(rows)


def describe(
    model: nn.Module,
    optimizer: Any = None,
    density: float = 0.05,
    sparse: Iterable[str] = (),
    dense: Iterable[str] = (),
    sparse_embeddings: bool = False,
) -> str:
    """Return a table of every parameter of a model: masked or dense, and why; nothing is changed.

    A note says what to look at before training: layers of one or two outputs or inputs, and outputs that are likely to
    lose all their inputs at this density. The other arguments are those of `add_module`.

    Raises:
        ValueError: as `add_module`, for patterns that match nothing.
    """
    judged = list(judge(model, sparse_embeddings, sparse))
    weights = [found.name for found in judged if not found.reason]
    chosen = named(weights, dense, usual_exceptions(model))
    groups = [] if optimizer is None else torch_optimizer(optimizer).param_groups
    stepped = {id(parameter) for group in groups for parameter in group["params"]}
    width = max((len(found.name) for found in judged), default=0)
    rows = [PARAMETERS.format("parameter", "shape", "number", "", "why, or what to look at", width=width)]
    masked = 0
    for name, parameter, reason, orientation, _ in judged:
        if not reason:
            reason = "named to stay dense" if name in chosen else ""
        if not reason and optimizer is not None and id(parameter) not in stepped:
            reason = "the optimizer does not step it"
        masked += 0 if reason else parameter.numel()
        note = reason or "; ".join(_expected(orientation, parameter.shape, density))
        kind = "dense" if reason else "masked"
        rows.append(PARAMETERS.format(name, _shape(parameter), parameter.numel(), kind, note, width=width).rstrip())
    total = sum(found.parameter.numel() for found in judged)
    return "\n".join(
        [
            *rows,
            f"{masked} of {total} parameters are masked; at density {density:g}, {round(density * masked)} of "
            f"them are active.",
        ]
    )


def _expected(orientation, shape, density):
    """Yield what is suspicious of a layer before its mask is drawn."""
    yield from _small(orientation, shape)
    outputs, *inputs = orientation.layer(shape)
    empty = orientation.copies * outputs * (1 - density) ** math.prod(inputs)
    if empty >= 0.5:
        yield f"about {round(empty)} of {orientation.copies * outputs} outputs without inputs at density {density:g}"


def _small(orientation, shape):
    outputs, inputs, *_ = orientation.layer(shape)
    for number, kind in ((outputs, "output"), (inputs, "input")):
        if number <= 2 and (kind == "output" or len(shape) == 2):
            yield f"{number} {kind}{'' if number == 1 else 's'}"


def _found(layer):
    """Yield what is suspicious of a layer that has its mask."""
    yield from _small(layer.orientation, layer.mask.shape)
    if not is_sharded(layer.mask):
        rows = layer.orientation.matrix(layer.mask)
        if empty := len(rows) - int(rows.any(1).sum()):
            yield f"{empty} of {len(rows)} outputs without inputs"


def log_counts(masking: Any) -> None:
    """Log the active weights of every layer and of the network."""
    for layer in masking.layers:
        size = layer.mask.numel()
        logger.info("%s: %d of %d active, density %.4f", layer.name, layer.nonzeros, size, layer.density)
    logger.info("Prune rate: %.4f. Active weights: %d.", masking.prune_rate, masking.total_nonzero)


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "1"
