"""Several methods on a user's own model and data: a table and a picture of their scores over seeds."""

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparselearning.core import Masking
from sparselearning.methods import Method, find_method
from sparselearning.start.maskable import maskable_parameters

logger = logging.getLogger(__name__)

COLUMNS = "{:{width}}  {:>8}  {:>14}  {:>10}  {:>10}  {:>5}"


class Loader(Protocol):
    """Batches (inputs, labels) that can be passed through again and again, and their number: a DataLoader, a list."""

    def __iter__(self) -> Any: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """The scores of a method, one for each seed; of the weights that masks go on, how many are active at the end."""

    method: str
    density: float
    active_weights: int
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for one seed."""
        count = len(self.scores)
        return statistics.stdev(self.scores) / math.sqrt(count) if count > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: `print` shows a table, and `plot` draws it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max(len(row.method) for row in self.rows)
        width = max(width, len("method"))
        lines = [COLUMNS.format("method", "density", "active weights", "score", "std. error", "seeds", width=width)]
        for row in self.rows:
            error = "-" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}"
            numbers = (f"{row.density:.4f}", f"{row.active_weights:,}", f"{row.mean:.4f}", error, len(row.scores))
            lines.append(COLUMNS.format(row.method, *numbers, width=width))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw mean and standard error of every method, and each seed as a small dot; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 0.9 + 0.4 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(self.rows):
            error = None if math.isnan(row.standard_error) else row.standard_error
            axes.errorbar(row.mean, place, xerr=error, fmt="o", color="#0072B2", capsize=4)
            axes.plot(row.scores, [place] * len(row.scores), ".", color="#D55E00", alpha=0.6)
        axes.set_yticks(range(len(self.rows)), [row.method for row in self.rows])
        axes.set_ylim(len(self.rows) - 0.5, -0.5)
        axes.set_xlabel("score: mean and standard error, and every seed")
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, dpi=150)


def compare(
    build: Callable[[], nn.Module],
    loader: Loader,
    evaluate: Callable[[nn.Module], float],
    methods: Sequence[str | Method] = ("dense", "sparse_momentum", "rigl", "set"),
    *,
    epochs: int = 10,
    density: float = 0.05,
    seeds: Iterable[int] = (0, 1, 2),
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    device: str | torch.device = "cpu",
) -> Comparison:
    """Train the models of `build` by several methods, with several seeds each, and return their scores.

        comparison = compare(lambda: Net(), train_loader, accuracy, ["dense", "set", "rigl"], epochs=20, density=0.1)
        print(comparison)
        comparison.plot("comparison.png")

    Args:
        build: returns a new model; it is called after the seed is set.
        loader: (inputs, labels) batches of an epoch.
        evaluate: score of a trained model, which is in evaluation mode.
        methods: keys of METHODS, `Method`s, or 'dense'.
        optimizer: returns the optimizer of a model; by default SGD(lr=0.1, momentum=0.9).
        loss: function of outputs and labels.

    Raises:
        ValueError: for an unknown method, two of one name, or no method, seed or batch.
    """
    seeds = list(seeds)
    names = [_name(method) for method in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Methods have the same name: {', '.join(twice)}. Use dataclasses.replace(method, name=...).")
    chosen = {_name(method): None if method == "dense" else find_method(method) for method in methods}
    if not (chosen and seeds and len(loader)):
        raise ValueError(f"Expected methods, seeds and batches, got {methods!r}, {seeds} and {len(loader)} batches.")
    rows = []
    for name, method in chosen.items():
        ended = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = build().to(device)
            stepper = (optimizer or _sgd)(model)
            masking = method and _masking(method, model, stepper, epochs, loader, density, device)
            _train(model, stepper, masking, epochs, loader, loss, device, seed)
            model.eval()
            with torch.no_grad():
                score = float(evaluate(model))
            ended.append((score, *_size(model, masking)))
            logger.info("%s, seed %d: score %.4f", name, seed, score)
        scores, densities, counts = zip(*ended, strict=True)
        rows.append(Row(name, densities[-1], counts[-1], scores))
    return Comparison(tuple(rows))


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _name(method):
    return method if isinstance(method, str) else method.name


def _masking(method, model, optimizer, epochs, loader, density, device):
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in islice(loader, 1)]
    steps = epochs * len(loader)
    return Masking.from_method(method, model, optimizer, total_steps=steps, density=density, batches=batches)


def _train(model, optimizer, masking, epochs, loader, loss, device, seed):
    model.train()
    for epoch in range(1, epochs + 1):
        torch.manual_seed(seed * epochs + epoch)  # every method sees the batches of an epoch in the same order
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss(model(inputs.to(device)), labels.to(device)).backward()
            optimizer.step()
        if masking is not None and epoch < epochs:
            masking.at_end_of_epoch()


def _size(model, masking):
    """Return the density of the weights that masks go on, and how many of them are active."""
    if masking is None:
        return 1.0, sum(weight.numel() for _, weight in maskable_parameters(model))
    return masking.density, masking.total_nonzero
