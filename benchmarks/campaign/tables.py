"""Tables and pictures of a campaign: ours beside the published numbers, and the difference in its standard errors."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from campaign.runs import DENSE, Campaign
from sparselearning.experiments.report import plots
from sparselearning.experiments.report.results import statistics
from sparselearning.methods import METHODS

Rows = Sequence[Mapping[str, Any]]
Cells = dict[tuple[str, float], list[dict[str, str]]]  # (method, density) -> the lines of its runs


def report(campaign: Campaign, path: Path) -> None:
    """Write the tables of the CSV file `path` to a file of the same name with .md, and the pictures beside it."""
    rows = campaign.rows(path)
    parts = [campaign.note] if campaign.note else []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        flags = " ".join(campaign.flags(model, "sparse_momentum", campaign.epochs))
        parts += [
            f"{campaign.title}, {model}: error in %, mean (standard error over seeds). Sparse momentum: `{flags}`.",
            table(campaign, model, of_model),
        ]
        for epochs in sorted({int(row["epochs"]) for row in of_model}):
            draw(campaign, of_model, epochs, path.with_name(f"{path.stem}-{model}-{epochs}"))
    text = path.with_suffix(".md")
    text.write_text("\n\n".join(parts) + "\n")
    logging.info("Wrote %s: %d runs", text, len(rows))


def table(campaign: Campaign, model: str, rows: Rows) -> str:
    """Return the table of a model: a line for each method and density, shorter runs in columns of their own."""
    whole = cells([row for row in rows if int(row["epochs"]) == campaign.epochs])
    lengths = sorted({int(row["epochs"]) for row in rows} - {campaign.epochs})
    shorter = {epochs: cells([row for row in rows if int(row["epochs"]) == epochs]) for epochs in lengths}
    headers = ["method", "weights", *(f"{name}, {campaign.epochs} epochs" for name in campaign.errors.values())]
    headers += ["published", "difference", "in its standard errors", "seeds", "at chance", "seconds per epoch"]
    first = next(iter(campaign.errors.values()))
    headers += [f"{first}, {epochs} epochs [seeds, at chance]" for epochs in lengths]
    lines = []
    for method, density in cells(rows):
        found = whole.get((method, density), [])
        published = campaign.published.get(model, {}).get(method, {}).get(density, ())
        line = [title(method), f"{100 * density:g}%", *details(campaign, found, published)]
        lines.append([*line, *(short(campaign, of.get((method, density), [])) for of in shorter.values())])
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def cells(rows: Rows) -> Cells:
    """Return the rows of each method and density, in the order of the table of methods."""
    groups: Cells = {}
    for row in rows:
        groups.setdefault((row["method"], float(row["density"])), []).append(dict(row))
    order = [*METHODS, DENSE]
    return dict(sorted(groups.items(), key=lambda cell: (order.index(cell[0][0]), cell[0][1])))


def details(campaign: Campaign, rows: Rows, published: Sequence[tuple[float, float | None]]) -> list[str]:
    """Return the cells of a line about the runs of full length."""
    errors = [[error(row, column) for row in rows] for column in campaign.errors]
    compared = errors[0]
    theirs = "; ".join(show(*pair) for pair in published)
    if not rows:
        return ["" for _ in errors] + [theirs, "", "", "", "", ""]
    pairs = [difference(compared, *pair) for pair in published]
    seconds = statistics([float(row["seconds_per_epoch"]) for row in rows])["mean"]
    counts = [str(len(rows)), str(at_chance(rows)), f"{seconds:.1f}"]
    means = [show(*mean_and_error(values)) for values in errors]
    return [*means, theirs, "; ".join(d for d, _ in pairs), "; ".join(e for _, e in pairs), *counts]


def short(campaign: Campaign, rows: Rows) -> str:
    """Return the cell about shorter runs."""
    if not rows:
        return ""
    errors = [error(row, next(iter(campaign.errors))) for row in rows]
    return f"{show(*mean_and_error(errors))} [{len(rows)}, {at_chance(rows)}]"


def difference(ours: Sequence[float], theirs: float, standard_error: float | None) -> tuple[str, str]:
    """Return ours - theirs, and the same in standard errors of the difference, "-" where one of them is not known.

    >>> difference([2.1, 2.3, 2.5], 2.0, 0.05)
    ('+0.30', '+2.4')
    """
    mean, spread = mean_and_error(ours)
    both = math.hypot(spread, standard_error) if spread is not None and standard_error is not None else 0.0
    return f"{mean - theirs:+.2f}", f"{(mean - theirs) / both:+.1f}" if both else "-"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and its standard error (None for one value)."""
    numbers = statistics(list(values))
    assert numbers["mean"] is not None
    return numbers["mean"], numbers["standard_error"]


def error(row: Mapping[str, str], column: str) -> float:
    """Return an error in % from a column of accuracies."""
    return 100 * (1 - float(row[column]))


def at_chance(rows: Rows) -> int:
    """Return how many of the runs ended with the training loss of guessing."""
    return sum(row["at_chance"] == "True" for row in rows)


def show(mean: float, standard_error: float | None) -> str:
    """Return a mean with its standard error.

    >>> show(2.364, 0.044), show(2.364, None)
    ('2.36 (0.04)', '2.36')
    """
    return f"{mean:.2f}" + ("" if standard_error is None else f" ({standard_error:.2f})")


def title(method: str) -> str:
    """Return the name of a method as the tables show it."""
    return "Dense" if method == DENSE else METHODS[method].name


def draw(campaign: Campaign, rows: Rows, epochs: int, stem: Path) -> None:
    """Draw accuracy against density (<stem>.png) and against training FLOPs (<stem>-flops.png) of runs of a length."""
    column, heading = next(iter(campaign.errors.items()))
    found = cells([row for row in rows if int(row["epochs"]) == epochs])
    points = [point(*cell, of, column) for cell, of in found.items()]
    measured = heading.replace("error", "accuracy")
    for against, end in [("density", ".png"), ("training_flops", "-flops.png")]:
        picture = stem.with_name(stem.name + end)
        plots.plot_accuracy_density(points, picture, by_error=True, against=against, measured=measured)
        logging.info("Wrote %s", picture)


def point(method: str, density: float, rows: Rows, column: str) -> dict[str, Any]:
    """Return a point of the pictures, with the standard error as its bar."""
    mean, spread = mean_and_error([float(row[column]) for row in rows])
    flops, _ = mean_and_error([float(row["training_flops"]) for row in rows])
    interval = None if spread is None else (mean - spread, mean + spread)
    return dict(label=title(method), density=density, training_flops=flops, accuracy=mean, interval=interval)
