"""Training of language models by the user's own command: tokens per second and memory, sparse beside dense.

    python benchmarks/language_speed.py
    python benchmarks/language_speed.py --quick
    python benchmarks/language_speed.py --other OTHER/language/main.py    # a checkout with a build of its own, too

Each run is a command of language/main.py in a process of its own: the model of language.py dense, dense with --compile,
and sparse, where attention has 30% of its weights and the MLPs have 10%. The kinds take turns. Speed is that of the
median of --parts parts of a run, each of --steps steps, so that what happens once, as compiling or an update of the
masks, does not count; a ratio is the median over rounds. Memory is the largest resident size of the process, and what
weights, gradients and optimizer state take. Writes results/language_speed-cpu.json.
"""

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common

import language

COMPILED = "dense, compiled"
MEASURED = ["tokens_per_second", "peak_mb", "held_mb"]
SMALL = "--data python --tokens characters --layers 2 --width 64 --heads 2 --context 32 --batch-size 4"


def main() -> None:
    """Measure, log and save."""
    args = common.parse(
        __doc__,
        rounds=5,
        methods=("smet,rigl,sparse_momentum", "sparse methods, with commas between"),
        parts=(5, "parts of a run"),
        steps=(8, "steps of a part"),
        other=("", "language/main.py of another checkout, which runs the sparse methods too"),
        data_dir=("", "folder of the data files"),
    )
    commands = commands_of(args)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in commands}
    with tempfile.TemporaryDirectory() as place:
        for number in range(args.rounds):
            for kind, (script, command) in commands.items():
                found[kind].append(measured(script, command, Path(place) / f"{number} {kind}", args))
    common.save(args, "language_speed", rows_of(found))


def commands_of(args: argparse.Namespace) -> dict[str, tuple[Path, str]]:
    """Return {kind: (script, command line)}."""
    model = SMALL if args.quick else language.MODEL
    steps = f"--steps {args.parts * args.steps} --eval-every {args.steps}"
    sparse = {
        method: f"{model} {steps} --method {method} {language.SPARSE} --weights sparse"
        for method in args.methods.split(",")
    }
    dense = f"{model} {steps} --dense"
    commands = {language.DENSE: (language.SCRIPT, dense), COMPILED: (language.SCRIPT, f"{dense} --compile")}
    commands |= {method: (language.SCRIPT, command) for method, command in sparse.items()}
    if args.other:
        commands |= {f"{method}, other": (Path(args.other).absolute(), command) for method, command in sparse.items()}
    return commands


def measured(script: Path, command: str, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make a run, and return what was measured of it."""
    run = language.make(command, place, args.threads, args.data_dir, script)
    if run is None:
        raise SystemExit(1)
    return {name: run[name] for name in MEASURED}


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the medians of each kind, and of its ratios to the dense model in the same round."""
    rows = []
    for kind, runs in found.items():
        row: dict[str, Any] = dict(kind=kind) | {
            name: statistics.median(run[name] for run in runs) for name in MEASURED
        }
        row["range"] = [pick(run["tokens_per_second"] for run in runs) for pick in (min, max)]
        for name in MEASURED:
            row[f"{name} / dense"] = ratio(runs, found[language.DENSE], name)
        row[f"tokens_per_second / {COMPILED}"] = ratio(runs, found[COMPILED], "tokens_per_second")
        if ours := found.get(kind.removesuffix(", other")):
            row["tokens_per_second / this checkout"] = ratio(runs, ours, "tokens_per_second")
        rows.append(row)
        logging.info("%s", json.dumps(row))
    return rows


def ratio(runs: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> float:
    return round(common.ratio([run[name] for run in runs], [run[name] for run in others]), 3)


if __name__ == "__main__":
    main()
