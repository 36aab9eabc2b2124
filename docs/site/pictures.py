"""Draw the pictures of the pages: one update of the masks, and results.

python docs/site/pictures.py         # writes docs/pictures/
"""

import csv
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import matplotlib.ticker
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor, nn

from sparselearning import Masking, reads
from sparselearning.grow import momentum_growth
from sparselearning.prune import magnitude_prune

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/pictures"
RESULTS = ROOT / "benchmarks/results"
STAYS, LEAVES, COMES, EMPTY = "#3465a4", "#cc3311", "#228833", "#eeeeee"
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"


def one_update() -> dict[str, dict[str, Any]]:
    """Make one update of sparse momentum on a small network; return, by layer, what there was to see of it."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(14, 10, bias=False), nn.Tanh(), nn.Linear(10, 6, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen: dict[str, dict[str, Any]] = {}

    def prune(masking, mask, weight, name):
        importance = masking.name2variance[name]
        seen[name] = {"weight": weight.detach().abs().clone(), "before": mask.clone(), "importance": importance}
        return magnitude_prune(masking, mask, weight, name)

    @reads("momentum")
    def grow(masking, name, new_mask, total_regrowth, weight):
        seen[name] |= {"momentum": masking.get_momentum_for_weight(weight).abs(), "pruned": new_mask.clone()}
        return momentum_growth(masking, name, new_mask, total_regrowth, weight)

    masking = Masking(optimizer, None, prune_rate=0.3, prune_mode=prune, growth_mode=grow)
    masking.add_module(model, density=0.3)
    target = nn.Sequential(nn.Linear(14, 10), nn.Tanh(), nn.Linear(10, 6))
    for _ in range(30):
        inputs = torch.randn(32, 14)
        optimizer.zero_grad()
        (model(inputs) - 3 * target(inputs).detach()).square().mean().backward()
        optimizer.step()
    masking.at_end_of_epoch()
    for name, mask in masking.masks.items():
        seen[name]["after"] = mask.clone()
    return seen


def cells(axes: Axes, mask: Tensor, colour: str, shade: Tensor | None = None, empty: bool = True) -> None:
    """Draw the entries of a mask as squares, the darker the larger `shade` is."""
    rows, columns = mask.shape
    for row in range(rows):
        for column in range(columns):
            place = (column, rows - 1 - row)
            if empty:
                axes.add_patch(matplotlib.patches.Rectangle(place, 0.9, 0.9, color=EMPTY, linewidth=0))
            if mask[row, column]:
                strength = 1.0 if shade is None else 0.25 + 0.75 * float(shade[row, column] / shade[mask].max())
                tint = [1 - strength * (1 - part) for part in to_rgb(colour)]
                axes.add_patch(matplotlib.patches.Rectangle(place, 0.9, 0.9, color=tint, linewidth=0))
    axes.set(xlim=(0, 14), ylim=(0, rows), aspect="equal")
    axes.axis("off")


def draw_update(path: Path) -> None:
    """Draw one update: a row for each layer, a column for each of its steps."""
    seen = one_update()
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    heights = [layer["before"].shape[0] for layer in seen.values()]
    grid = figure.subplots(len(seen), 4, height_ratios=heights)
    titles = ["Active weights", "1. Prune the smallest", "3. Grow where momentum is largest", "After the update"]
    for column, title in enumerate(titles):
        grid[0][column].set_title(title, fontsize=11)
    for row, (name, layer) in zip(grid, seen.items(), strict=True):
        before, pruned, after = layer["before"], layer["pruned"], layer["after"]
        leaves, comes = before & ~pruned, after & ~pruned
        cells(row[0], before, STAYS, layer["weight"])
        cells(row[1], pruned, STAYS)
        cells(row[1], leaves, LEAVES, empty=False)
        cells(row[2], ~pruned, GREY, layer["momentum"])
        cells(row[2], pruned, "#ffffff", empty=False)
        cells(row[2], comes, COMES, empty=False)
        cells(row[3], after & before, STAYS)
        cells(row[3], after & ~before, COMES, empty=False)
        captions = [
            f"layer {name.partition('.')[0]}: {int(before.sum())} of {before.numel()} active",
            f"{int(leaves.sum())} leave (red)",
            f"2. importance {layer['importance']:.0%}: {int(comes.sum())} come (green)",
            f"{int(after.sum())} of {after.numel()} active",
        ]
        for axes, caption in zip(row, captions, strict=True):
            axes.text(0, -0.35, caption, fontsize=9.5, verticalalignment="top")
    write(figure, path)


def draw_results(path: Path) -> None:
    """Draw what sparse momentum reaches on MNIST beside the dense network and the paper, and methods at 5%."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    draw_densities(left)
    draw_methods(right)
    write(figure, path)


PUBLISHED = {0.01: (2.36, 0.04), 0.02: (1.99, 0.02), 0.03: (1.70, 0.06), 0.04: (1.58, 0.02), 0.05: (1.53, 0.02)}
PUBLISHED |= {0.1: (1.33, 0.03)}  # Dettmers and Zettlemoyer 2019: error of LeNet-300-100 in %, and its standard error


def draw_densities(axes: Axes) -> None:
    """Draw the error of LeNet-300-100 against density: runs_mnist.csv and the paper."""
    errors: dict[float, list[float]] = {}
    for row in read("runs_mnist.csv"):
        if row["model"] == "lenet300-100" and row["method"] in ("sparse_momentum", "dense") and row["epochs"] == "100":
            errors.setdefault(float(row["density"]), []).append(100 * (1 - float(row["test_accuracy"])))
    ours = {density: error_of(runs) for density, runs in sorted(errors.items())}
    dense, _ = ours.pop(1.0)
    for points, colour, marker, label in [(ours, BLUE, "o", "this library"), (PUBLISHED, ORANGE, "s", "published")]:
        places = [density * (1 if points is ours else 1.04) for density in points]
        means, deviations = zip(*points.values(), strict=True)
        axes.errorbar(places, means, deviations, color=colour, marker=marker, markersize=5, capsize=3, label=label)
    axes.axhline(dense, color=GREY, linestyle="--", label="dense")
    axes.set_xscale("log")
    axes.set_xticks([*ours], [f"{density:.0%}" for density in ours])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set(xlabel="weights that are active", ylabel="test error in %", ylim=(1.2, 2.5))
    axes.set_title("Sparse momentum, 100 epochs, 5 seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_methods(axes: Axes) -> None:
    """Draw the error of the methods on LeNet-300-100 at 5% after 20 epochs, best first, of methods_mnist.csv."""
    from sparselearning.methods import METHODS

    errors: dict[str, list[float]] = {}
    for row in read("methods_mnist.csv"):
        is_dense = row["method"] == "dense"
        if (row["model"], row["epochs"]) == ("lenet300-100", "20") and (is_dense or row["density"] == "0.05"):
            errors.setdefault(row["method"], []).append(100 * (1 - float(row["test_accuracy"])))
    points = sorted(((*error_of(runs), method) for method, runs in errors.items()), reverse=True)
    names = ["Dense" if method == "dense" else METHODS[method].name for _, _, method in points]
    for height, (mean, deviation, method) in enumerate(points):
        colour = {"dense": GREY, "sparse_momentum": BLUE}.get(method, "#7799bb")
        axes.errorbar(mean, height, xerr=deviation, color=colour, marker="o", markersize=4, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set(xlabel="test error in %")
    axes.set_title(f"{len(points) - 1} methods at 5%, 20 epochs, 3 seeds", fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open() as file:
        return [*csv.DictReader(file)]


def error_of(runs: list[float]) -> tuple[float, float]:
    """Return the mean of some runs and its standard error."""
    return statistics.mean(runs), statistics.stdev(runs) / len(runs) ** 0.5 if len(runs) > 1 else 0.0


def write(figure: Figure, path: Path) -> None:
    """Write a figure; the same figure makes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "sparselearning", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else {"Date": None}, dpi=150)


if __name__ == "__main__":
    draw_update(FOLDER / "update.png")
    draw_results(FOLDER / "results.png")
