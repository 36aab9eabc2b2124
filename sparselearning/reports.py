"""What a Masking says of itself: a line, a table of its layers, and counts in the log."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

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
    """Return a table of the masked layers, then of the parameters that stay dense, with the reason.

    Importance is a layer's share in the last update; a note says how a weight is held, where not by zeros.
    """
    names = [*masking.masks, *masking.kept_dense, "masked weights"]
    width = max(map(len, names))
    rows = [COLUMNS.format("layer", "shape", "active", "of", "density", "importance", "note", width=width)]
    for layer in masking.layers:
        counts = (_shape(layer.mask), layer.nonzeros, layer.mask.numel(), f"{layer.density:.4f}")
        notes = [] if layer.pattern.name == "unstructured" else [layer.pattern.name]
        notes += [note for note in [masking.held.describe(layer)] if note]
        rows.append(
            COLUMNS.format(layer.name, *counts, f"{layer.importance:.4f}", ", ".join(notes), width=width).rstrip()
        )
    size = masking.total_nonzero + masking.total_zero
    total = ("", masking.total_nonzero, size, f"{masking.density:.4f}", "", "")
    rows.append(COLUMNS.format("masked weights", *total, width=width).rstrip())
    for name, (parameter, reason) in masking.kept_dense.items():
        dense = (_shape(parameter), parameter.numel(), parameter.numel(), "dense", "", reason)
        rows.append(COLUMNS.format(name, *dense, width=width))
    return "\n".join(rows)


def log_counts(masking: Any) -> None:
    """Log the active weights of every layer and of the network."""
    for layer in masking.layers:
        size = layer.mask.numel()
        logger.info("%s: %d of %d active, density %.4f", layer.name, layer.nonzeros, size, layer.density)
    logger.info("Prune rate: %.4f. Active weights: %d.", masking.prune_rate, masking.total_nonzero)


def _shape(tensor):
    return "x".join(map(str, tensor.shape)) or "1"
