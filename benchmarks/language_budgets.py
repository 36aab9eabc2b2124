"""Validation loss against active parameters: dense networks of several widths, and wider sparse ones with as many.

    python benchmarks/language_budgets.py                # hours; goes on where it was stopped
    python benchmarks/language_budgets.py --method set --steps 500
    python benchmarks/language_budgets.py --report       # the table and the picture of the runs that are there

Each run is a command of language/main.py on Tiny Shakespeare by characters: 4 layers, context 128, batch 16. Dense
networks have the widths of --widths. For each of these but the last, networks of the larger widths have a density that
leaves them as many active weights in attention and MLPs. Writes a line for each run to results/language_budgets.csv,
the table to results/language_budgets.md and the picture to results/language_budgets.png.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from campaign import kept
from tabulate import tabulate

from language import FIRST_SEED, MEASURED, make_all, parser_of
from sparselearning.experiments.report import plots
from sparselearning.flags import positive_int

MODEL = "--data shakespeare --tokens characters --layers 4 --context 128 --batch-size 16"
HEAD_WIDTH = 32
COLUMNS = ["command", "kind", "width", "density", "seed", *MEASURED, "peak_mb", "held_mb"]
COLUMNS += ["threads", "torch", "commit", "hardware"]


def commands(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs, seed by seed: command line, kind, width, density, seed."""
    found = []
    every = max(args.steps // 10, 1)
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for width in args.widths:
            for narrow in [narrow for narrow in args.widths if narrow <= width]:
                density = round((narrow / width) ** 2, 6)
                sparse = (
                    f"--method {args.method} --density {density} --prune-every-k-steps 100 --weights {args.weights}"
                )
                flags = (
                    f"{MODEL} --width {width} --heads {width // HEAD_WIDTH} --steps {args.steps} --eval-every {every}"
                )
                command = f"{flags} {sparse if density < 1 else '--dense'} --seed {seed}"
                kind = "dense" if density == 1 else f"{args.method}, width {width}"
                found.append(dict(command=command, kind=kind, width=width, density=density, seed=seed))
    return found


def points_of(rows: Sequence[Mapping[str, str]]) -> dict[str, list[tuple[int, float, float, int]]]:
    """Return by kind: (active weights, mean loss, its standard error or 0, seeds), by active weights."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["kind"], int(row["active_weights"])), []).append(float(row["best_valid_loss"]))
    points: dict[str, list[tuple[int, float, float, int]]] = {}
    for (kind, active), losses in sorted(groups.items()):
        error = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        points.setdefault(kind, []).append((active, mean(losses), error, len(losses)))
    return points


def report(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the table and the picture beside it."""
    points = points_of(rows)
    figure, (axes,) = plots._figure(6, 4)
    for (kind, own), colour, marker in zip(points.items(), plots.COLOURS, plots.MARKERS, strict=False):
        active, losses, errors, _ = zip(*own, strict=True)
        axes.errorbar(active, losses, errors, color=colour, marker=marker, markersize=4, capsize=2, label=kind)
    axes.set_xscale("log")
    plots._label(axes, "active weights of attention and MLPs", "validation loss, nats")
    plots._legend(axes)
    plots._write(figure, path.with_suffix(".png"))
    lines = [
        [kind, f"{active:,}", f"{loss:.4f}", f"{error:.4f}" if seeds > 1 else "", seeds]
        for kind, own in points.items()
        for active, loss, error, seeds in own
    ]
    headers = ["network", "active weights", "loss, nats", "standard error", "seeds"]
    path.write_text(tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n")


def main() -> int:
    """Make the runs that are left, and write table and picture; return the exit status."""
    parser = parser_of(__doc__, "language_budgets", steps=2000)
    add = parser.add_argument
    add("--widths", type=positive_int, nargs="+", default=[64, 128, 256], help="multiples of 32 (default: 64 128 256)")
    add("--method", default="rigl", help="of the sparse networks (default: %(default)s)")
    args = parser.parse_args()
    if wrong := [width for width in args.widths if width % HEAD_WIDTH]:
        parser.error(f"--widths: expected multiples of {HEAD_WIDTH}, got {wrong[0]}")
    args.widths = sorted(set(args.widths))
    failed = make_all(commands(args), COLUMNS, args)
    if rows := kept.read(args.csv):
        report(rows, args.csv.with_suffix(".md"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
