"""Pictures of runs: accuracy per epoch, density per layer, accuracy against density, class specialisation.

`metrics` are the records of a run's metrics.jsonl; those without an epoch (the test result) may be among them.
Every function writes one picture, atomically; the ending of `path` (.png, .pdf, .svg) gives the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sparselearning import checkpoint
from sparselearning.experiments.features import specialisation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour vision.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
# For more series than that: each with a colour and a marker of its own.
MANY_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B0000", "#7F7F7F"]
MANY_COLOURS += ["#6A3D9A", "#B2DF8A", "#8C564B", "#17BECF", "#F0C808", "#FF6FB5", "#2F4F4F", "#1F3A93", "#9ACD32"]
MANY_MARKERS = "osD^vPX<>ph*8d12+x"
MOST_LINES = len(COLOURS)


def plot_curves(metrics: Metrics, path: str | Path) -> None:
    """Draw validation and test accuracy, and training and validation loss, per epoch."""
    figure, (accuracy, loss) = _figure(9, 3.6, columns=2)
    _draw_line(accuracy, metrics, "valid_accuracy", "validation", COLOURS[0])
    for record in metrics:
        if "test_accuracy" in record:
            height = record["test_accuracy"]
            accuracy.axhline(height, color=COLOURS[1], linestyle="--", label=f"test {height:.2%}")
    _draw_line(loss, metrics, "train_loss", "training", COLOURS[2])
    _draw_line(loss, metrics, "valid_loss", "validation", COLOURS[0])
    _label(accuracy, "epoch", "accuracy")
    _label(loss, "epoch", "loss")
    _percent(accuracy.yaxis)
    for axes in (accuracy, loss):
        _legend(axes)
    _write(figure, path)


def plot_density(metrics: Metrics, path: str | Path) -> None:
    """Draw the density of every layer per epoch: as lines for a few layers, as a heat map for many.

    Both scales are logarithmic; the number beside a layer is its last density.
    """
    layers = len(_densities(metrics))
    figure, (axes,) = _figure(8, 4 if layers <= MOST_LINES else 1.4 + 0.17 * layers)
    _draw_densities(axes, metrics)
    _write(figure, path)


def plot_demo(runs: Mapping[str, Metrics], path: str | Path) -> None:
    """Draw the accuracy per epoch of all `runs` (label -> metrics) and the densities of the first sparse one."""
    sparse = [label for label, metrics in runs.items() if _densities(metrics)][:1]
    figure, axes = _figure(6 + 5.5 * len(sparse), 4, columns=1 + len(sparse))
    for (label, metrics), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        _draw_line(axes[0], metrics, "valid_accuracy", label, colour)
    _label(axes[0], "epoch", "validation accuracy")
    _percent(axes[0].yaxis)
    _legend(axes[0])
    for label in sparse:
        _draw_densities(axes[1], runs[label])
        axes[1].set_title(f"{label}: density per layer", fontsize=10)
    _write(figure, path)


def plot_accuracy_density(rows: Sequence[Mapping[str, Any]], path: str | Path, *, by_error: bool = False) -> None:
    """Draw accuracy against density with error bars, one series per label.

    Beside sparse series, one that only has a dense point (density 1) is a horizontal line, its interval a band. Where
    there are many series, the legend is outside.

    Args:
        rows: one mapping per point: "label"; "density" and "accuracy" in [0, 1]; "interval", (low, high) of the
            accuracy or None.
        by_error: space accuracies, all below 1, by the logarithm of the error, which tells the best ones apart.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    many = len(labels) > MOST_LINES
    figure, (axes,) = _figure(9.5, 6) if many else _figure(7, 4.5)
    lowest = min(row["density"] for row in rows)
    looks = zip(MANY_COLOURS, MANY_MARKERS, strict=True) if many else zip(COLOURS, MARKERS, strict=True)
    looks = list(looks)
    styles = [(*look, line) for line in ("-", "--", ":") for look in looks]
    for label, (colour, marker, line) in zip(labels, cycle(styles), strict=False):
        points = sorted((row for row in rows if row["label"] == label), key=lambda row: row["density"])
        density, accuracy = (np.array([row[key] for row in points]) for key in ("density", "accuracy"))
        low, high = np.array([row["interval"] or (row["accuracy"],) * 2 for row in points]).T
        if density.min() == 1 > lowest:
            axes.axhline(accuracy[0], color=colour, linestyle="--", label=label)
            axes.axhspan(low[0], high[0], color=colour, alpha=0.15, linewidth=0)
        else:
            bars = np.maximum([accuracy - low, high - accuracy], 0)
            axes.errorbar(density, accuracy, bars, color=colour, marker=marker, linestyle=line, capsize=3, label=label)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), min(top, 1))  # the interval of two runs may leave [0, 1]
    _label(axes, "density", "test accuracy")
    if by_error:
        _by_error(axes)
    else:
        _percent(axes.yaxis)
    _log_percent(axes.xaxis)
    _legend(axes, **(dict(loc="center left", bbox_to_anchor=(1, 0.5)) if many else {}))
    _write(figure, path)


def _by_error(axes: Axes) -> None:
    """Space the accuracies of an axis by the logarithm of their error."""
    _, top = axes.get_ylim()
    highest = max(float(np.max(line.get_ydata())) for line in axes.get_lines())
    axes.set_ylim(top=min(top, 1 - (1 - highest) / 1.3))
    axes.set_yscale("function", functions=(lambda y: -np.log10(np.maximum(1 - y, 1e-6)), lambda z: 1 - 10**-z))
    bottom, top = axes.get_ylim()
    errors = [digit * 10.0**power for power in range(-5, 0) for digit in (1, 1.5, 2, 3, 5, 7)]
    axes.set_yticks([1 - error for error in errors if bottom <= 1 - error <= top])
    axes.yaxis.set_major_formatter(lambda value, _position: f"{100 * value:.4g}%")
    axes.minorticks_off()


def plot_speed_ups(bars: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draw bars in groups: layer -> {series: how many times faster than dense}; a line marks dense."""
    figure, (axes,) = _figure(1.5 + 1.3 * len(bars), 4)
    labels = list(dict.fromkeys(label for group in bars.values() for label in group))
    width = 0.8 / len(labels)
    for i, (label, colour) in enumerate(zip(labels, cycle(COLOURS), strict=False)):
        heights = [group.get(label, float("nan")) for group in bars.values()]
        places = np.arange(len(bars)) + (i - (len(labels) - 1) / 2) * width
        drawn = axes.bar(places, heights, width, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f", fontsize=6)
    axes.axhline(1, color="0.3", linewidth=0.8)
    _label(axes, "", "times faster than dense")
    axes.set_xticks(range(len(bars)), list(bars))
    _legend(axes)
    _write(figure, path)


def plot_feature_histograms(dense: Mapping[str, Tensor], sparse: Mapping[str, Tensor], path: str | Path) -> None:
    """Draw how the class specialisation of channels is distributed, dense against sparse, layer by layer.

    Bars are shares of the channels that count; a line marks the median. See `features.specialisation`.

    Args:
        dense, sparse: layer name -> activation [channels, classes], of the same layers, as from
            `features.collect`.
    """
    columns = min(5, ceil(sqrt(len(dense))))
    rows = ceil(len(dense) / columns)
    figure, panels = _figure(max(4.5, 2.6 * columns), 0.8 + 2.1 * rows, rows, columns, shared=True)
    values = {name: (specialisation(dense[name]), specialisation(sparse[name])) for name in dense}
    lowest = 1 / next(iter(dense.values())).shape[1]
    highest = max((float(v.max()) for pair in values.values() for v in pair if len(v)), default=lowest)
    bins = np.linspace(lowest, max(highest, lowest + 0.05), 26)
    for axes, (name, pair) in zip(panels, values.items(), strict=False):
        for channels, colour, label in zip(pair, COLOURS, ("dense", "sparse"), strict=False):
            _draw_histogram(axes, channels.numpy(), bins, colour, label)
        axes.set_title(name, fontsize=9)
        _label(axes)
    for axes in panels[max(0, len(values) - columns) : len(values)]:
        axes.tick_params(labelbottom=True)
    for axes in panels[len(values) :]:
        axes.remove()
    figure.supxlabel("class specialisation: share of the most frequent class", fontsize=10)
    figure.supylabel("share of channels", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    _write(figure, path)


def _draw_line(axes: Axes, metrics: Metrics, key: str, label: str, colour: str) -> None:
    points = [(record["epoch"], record[key]) for record in metrics if record.get(key) is not None]
    if points:
        marker = "o" if len(points) <= 30 else None
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3.5, label=label)


def _draw_densities(axes: Axes, metrics: Metrics) -> None:
    densities = _densities(metrics)
    epochs = [record["epoch"] for record in metrics if "density_per_layer" in record]
    draw = _draw_density_lines if len(densities) <= MOST_LINES else _draw_density_map
    draw(axes, epochs, densities)


def _draw_density_lines(axes: Axes, epochs: list[int], densities: dict[str, np.ndarray]) -> None:
    downwards = sorted(densities.items(), key=lambda item: -item[1][-1])
    for (name, density), colour in zip(downwards, COLOURS, strict=False):
        marker = "o" if len(epochs) <= 30 else None
        axes.plot(epochs, density, color=colour, marker=marker, markersize=3.5, label=f"{name}  {density[-1]:.2%}")
    _label(axes, "epoch", "density")
    _log_percent(axes.yaxis)
    _legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_density_map(axes: Axes, epochs: list[int], densities: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import LogNorm

    values = np.ma.masked_less_equal(list(densities.values()), 0)
    norm = LogNorm(values.min() / 1.01, values.max() * 1.01)
    edges = (epochs[0] - 0.5, epochs[-1] + 0.5, len(densities) - 0.5, -0.5)
    axes.set_facecolor("0.8")  # a layer without weights
    image = axes.imshow(values, cmap="viridis", norm=norm, extent=edges, aspect="auto", interpolation="nearest")
    rows = range(len(densities))
    axes.set_yticks(rows, list(densities), fontsize=7)
    right = axes.secondary_yaxis("right")
    right.set_yticks(rows, [f"{density[-1]:.1%}" for density in densities.values()], fontsize=7)
    right.tick_params(length=0)
    _label(axes, "epoch")
    axes.grid(False)
    axes.tick_params(axis="y", labelsize=7)
    bar = axes.figure.colorbar(image, ax=axes, label="density", pad=0.02, aspect=35)
    _log_percent(bar.ax.yaxis)


def _draw_histogram(axes: Axes, values: np.ndarray, bins: np.ndarray, colour: str, label: str) -> None:
    weights = np.full(len(values), 1 / max(len(values), 1))
    axes.hist(values, bins.tolist(), weights=weights, color=colour, alpha=0.35, label=label)
    axes.hist(values, bins.tolist(), weights=weights, color=colour, histtype="step")
    if len(values):
        axes.axvline(float(np.median(values)), color=colour, linestyle="--", linewidth=1.2)


def _densities(metrics: Metrics) -> dict[str, np.ndarray]:
    """Layer name -> density per epoch; empty for a dense run."""
    records = [record["density_per_layer"] for record in metrics if record.get("density_per_layer")]
    return {name: np.array([record[name] for record in records]) for name in (records[0] if records else ())}


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, shared: bool = False
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of its own, in inches: pyplot would keep it alive and ask for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    return figure, panels.flatten().tolist()


def _label(axes: Axes, x: str = "", y: str = "") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1))


def _log_percent(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _position: f"{100 * value:.3g}%")


def _legend(axes: Axes, **placement: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, **placement)


def _write(figure: Figure, path: str | Path) -> None:
    kind = Path(path).suffix[1:] or "png"
    checkpoint.write_atomically(path, lambda file: figure.savefig(file, format=kind))
