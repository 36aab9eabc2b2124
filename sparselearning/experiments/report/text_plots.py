"""Pictures of language models: losses by step in nats and in bits per byte, and of two runs beside each other."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from sparselearning.experiments.report import plots
from sparselearning.experiments.report.plots import COLOURS, Metrics


def plot_losses(metrics: Metrics, path: str | Path) -> None:
    """Draw training and validation loss by step; the axis on the right has bits per byte."""
    figure, (axes,) = plots._figure(6.5, 4)
    _draw(axes, metrics, "train_loss", "training", COLOURS[2])
    _draw(axes, metrics, "valid_loss", "validation", COLOURS[0])
    last = metrics[-1]
    label = f"best: {last['best_valid_loss']:.4f} at step {last['best_step']}"
    axes.plot(last["best_step"], last["best_valid_loss"], "*", color=COLOURS[1], markersize=10, label=label)
    _finish(axes, metrics)
    plots._write(figure, path)


def plot_runs(runs: Mapping[str, Metrics], path: str | Path) -> None:
    """Draw the validation loss by step of all `runs` (label -> metrics), and the densities of the first sparse one."""
    sparse = [label for label, metrics in runs.items() if plots._densities(metrics)][:1]
    figure, axes = plots._figure(6 + 6 * len(sparse), 4.2, columns=1 + len(sparse))
    for (label, metrics), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        _draw(axes[0], metrics, "valid_loss", label, colour)
    _finish(axes[0], next(iter(runs.values())))
    axes[0].set_ylabel("validation loss, nats")
    for label in sparse:
        plots._draw_densities(axes[1], runs[label])
        axes[1].set_title(f"{label}: density per layer", fontsize=10)
    plots._write(figure, path)


def _draw(axes, metrics, key, label, colour):
    points = [(record["steps"], record[key]) for record in metrics if key in record]
    marker = "o" if len(points) <= 30 else None
    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, label=label)


def _finish(axes, metrics):
    ratio = metrics[-1]["valid_bits_per_byte"] / metrics[-1]["valid_loss"]
    plots._label(axes, "step", "loss, nats")
    right = axes.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
    right.set_ylabel("bits per byte")
    right.tick_params(labelsize=8)
    plots._legend(axes)
