"""Losses, time and memory of sparse language models beside a dense one, on Tiny Shakespeare by characters.

    python benchmarks/language.py                                  # hours to days; goes on where it was stopped
    python benchmarks/language.py --methods dense rigl --seeds 1 --steps 500
    python benchmarks/language.py --report                         # the table of the runs that are there

Each run is a command of language/main.py: 6 layers, width 384, 6 heads, context 128, batch 16; attention has 30% of its
weights and the MLPs 10%, 16.7% of both together. Writes a line for each run to results/language.csv and the table to
results/language.md.
"""

import argparse
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import common
from campaign import kept
from tabulate import tabulate

from sparselearning.experiments.report.held_bytes import bytes_held
from sparselearning.flags import positive_int

SCRIPT = Path(__file__).parents[1] / "language" / "main.py"
DENSE = "dense"
METHODS = [DENSE, "smet", "rigl", "sparse_momentum", "set", "static", "cht_soft"]
MODEL = "--data shakespeare --tokens characters --layers 6 --width 384 --heads 6 --context 128 --batch-size 16"
SPARSE = "--layer-density attention=0.3,mlp=0.1 --prune-every-k-steps 100"
FIRST_SEED = 17
MEASURED = ["best_valid_loss", "best_step", "valid_loss", "active_weights", "tokens_per_second", "seconds"]
AVERAGED = ["best_valid_loss", "best_step", "tokens_per_second", "peak_mb", "held_mb"]
COLUMNS = [
    "command",
    "method",
    "seed",
    "steps",
    *MEASURED,
    "peak_mb",
    "held_mb",
    "threads",
    "torch",
    "commit",
    "hardware",
]


def commands(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return method, seed, steps and command line of the runs, seed by seed."""
    every = args.steps // 20 if args.steps % 20 == 0 else args.steps
    common_flags = f"{MODEL} --steps {args.steps} --eval-every {every} {args.flags}".strip()
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        for method in args.methods:
            choice = "--dense" if method == DENSE else f"--method {method} {SPARSE} --weights {args.weights}"
            command = f"{common_flags} {choice} --seed {seed}"
            found.append(dict(command=command, method=method, seed=seed, steps=args.steps))
    return found


def make(command: str, place: Path, threads: int, data_dir: str | None, script: Path = SCRIPT) -> dict[str, Any] | None:
    """Make a run in the folder `place`, or go on with it; return what was measured, or None if it failed."""
    place.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, str(script), *shlex.split(command), "--device", "cpu", "--resume", "auto"]
    argv += ["--max-threads", str(threads), "--run-dir", str(place)]
    argv += ["--data-dir", data_dir] if data_dir else []
    path = os.pathsep.join(filter(None, [str(script.parents[1]), os.environ.get("PYTHONPATH")]))  # the script's package
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    with (place / "console.txt").open("w+") as console:
        process = subprocess.Popen(argv, env=environment, stdout=console, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        console.seek(0)
        last = (console.read().strip().splitlines() or [""])[-1]
    if process.returncode:
        logging.error("main.py %s ended with status %d: %s", command, process.returncode, last)
        return None
    (metrics,) = place.glob("*/metrics.jsonl")
    return measured(metrics.parent) | dict(peak_mb=round(used.ru_maxrss / 1024))


def measured(folder: Path) -> dict[str, Any]:
    """Return the results of a finished run by column."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {name: records[-1][name] for name in MEASURED}
    found |= dict(seconds=round(sum(record["seconds"] for record in records), 1))
    found |= dict(tokens_per_second=round(median(record["tokens_per_second"] for record in records)))
    found |= {name: round(found[name], 4) for name in ("best_valid_loss", "valid_loss")}
    return found | dict(held_mb=round(bytes_held(folder / "checkpoint.pt") / 1e6, 2))


def report(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the table: means over seeds, and each method beside the dense model of as many steps."""
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["steps"], row["method"]), []).append(row)
    means = {key: {name: mean(float(row[name]) for row in of) for name in AVERAGED} for key, of in groups.items()}
    lines = []
    for (steps, method), of in groups.items():
        here, dense = means[steps, method], means.get((steps, DENSE))
        beside = ["", "", ""]
        if dense is not None and method != DENSE:
            gap, speed = here["best_valid_loss"] - dense["best_valid_loss"], here["tokens_per_second"]
            beside = [
                f"{gap:+.3f}",
                f"{speed / dense['tokens_per_second']:.2f}",
                f"{here['held_mb'] / dense['held_mb']:.2f}",
            ]
        loss, best = f"{here['best_valid_loss']:.4f}", f"{here['best_step']:.0f}"
        memory = [f"{here['held_mb']:.1f}", beside[2], f"{here['peak_mb']:.0f}"]
        lines.append(
            [steps, method, len(of), loss, beside[0], best, f"{here['tokens_per_second']:.0f}", beside[1], *memory]
        )
    headers = ["steps", "method", "seeds", "loss", "- dense", "best step", "tokens/s", "/ dense"]
    headers += ["MB held", "/ dense", "peak MB"]
    head = (
        "Tiny Shakespeare by characters, 6 layers, width 384: lowest validation loss in nats, tokens per second of the "
        "median epoch, MB of weights, gradients and optimizer state, peak memory of the process.\n\n"
    )
    path.write_text(head + tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n")


def parser_of(description: str | None, name: str, steps: int) -> argparse.ArgumentParser:
    """Return a parser of what runs of language/main.py take; `name` is that of their folder and results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=2, help=f"from {FIRST_SEED} on (default: %(default)s)")
    add("--steps", type=positive_int, default=steps, help="steps of a run (default: %(default)s)")
    add("--weights", default="sparse", help="how weights of sparse runs are held (default: %(default)s)")
    add("--max-threads", type=positive_int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    add("--data-dir", help="folder of the data files (default: that of main.py)")
    add("--run-dir", type=Path, default=Path("runs") / name, help="folder of the runs (default: %(default)s)")
    add("--csv", type=Path, default=common.RESULTS / f"{name}.csv", help="results (default: %(default)s)")
    add("--report", action="store_true", help="write what is made of the results, and make no run")
    return parser


def make_all(runs: Sequence[Mapping[str, Any]], columns: list[str], args: argparse.Namespace) -> int:
    """Make the runs that have no results yet, each with a command, and keep what they give; return how many failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    machine = common.machine("cpu")
    here = dict(
        threads=args.max_threads, torch=machine["torch"], commit=machine["commit"], hardware=machine["processor"]
    )
    failed = 0
    for run in [] if args.report else runs:
        command = run["command"]
        if command in {row["command"] for row in kept.read(args.csv)}:
            continue
        place = args.run_dir / hashlib.sha256(command.encode()).hexdigest()[:12]
        if (found := make(command, place, args.max_threads, args.data_dir)) is None:
            failed += 1
            continue
        kept.append(args.csv, {**run, **found, **here}, columns)
        logging.info(
            "%.4f nats, %d tokens per second: %s", found["best_valid_loss"], found["tokens_per_second"], command
        )
    return failed


def main() -> int:
    """Make the runs that are left, and write the table; return the exit status."""
    parser = parser_of(__doc__, "language", steps=5000)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD", help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--flags", default="", help="more flags of every run, such as '--dropout 0.1' (default: none)")
    args = parser.parse_args()
    failed = make_all(commands(args), COLUMNS, args)
    if rows := kept.read(args.csv):
        report(rows, args.csv.with_suffix(".md"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
