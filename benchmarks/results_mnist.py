"""Test error of every method on MNIST at several densities, with mean and standard error over seeds.

    python benchmarks/results_mnist.py
    python benchmarks/results_mnist.py --models lenet300-100 --methods set rigl --densities 0.05 --seeds 1 --epochs 10
    python benchmarks/results_mnist.py --report

Runs mnist_cifar/main.py in two processes of one thread each, LeNet-300-100 and the first seed first. Every finished run
adds a line to results/methods_mnist.csv. Runs that are in the file are not repeated, so an interrupted sweep continues.
At the end, or at once with --report, it writes the tables of all runs to results/methods_mnist.md and one picture per
model and number of epochs to results/methods_mnist-<model>-<epochs>.png.
"""

import argparse
import csv
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import common
import torch
from tabulate import tabulate

from sparselearning.experiments.report import plots
from sparselearning.experiments.report.results import statistics
from sparselearning.methods import METHODS
from sparselearning.start.distributions import DISTRIBUTIONS

SCRIPT = Path(__file__).parent.parent / "mnist_cifar" / "main.py"
KEY = ["model", "method", "density", "seed", "epochs"]
COLUMNS = [*KEY, "test_accuracy", "active_weights", "exploration_rate", "seconds", "commit", "torch"]
FIRST_SEED = 17
DECAY_STEPS = 25000  # steps between two decays of the learning rate in 100 epochs; proportional in shorter runs
DENSE = "dense"
WRITING = threading.Lock()

# At the default learning rate a dense LeNet-5 sometimes stays at chance. At a density of 1% it does not learn if masks
# are drawn at random on weights initialised for a dense network; weights chosen by a score pass the signal on.
FLAGS = {"lenet300-100": [], "lenet5": ["--lr", "0.05", "--rescale"]}

# Test accuracy in %. Sparse momentum and dense are from Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840;
# the others are quoted there from Mostafa & Wang 2019.
PUBLISHED = {
    "lenet300-100": {
        "Sparse momentum": {0.01: 97.53, 0.02: 98.20, 0.03: 98.30, 0.04: 98.42, 0.05: 98.53, 0.1: 98.67},
        "DSR": {0.01: 97.54, 0.02: 98.14, 0.03: 98.20, 0.04: 98.23, 0.05: 98.32, 0.1: 98.44},
        "SET": {0.01: 95.80, 0.02: 97.74, 0.03: 98.06, 0.04: 98.10, 0.05: 98.14, 0.1: 98.39},
        "Deep Rewiring": {0.01: 94.0, 0.02: 98.21, 0.03: 98.22, 0.04: 98.30, 0.05: 98.06, 0.1: 98.19},
        "Dense": {1.0: 98.69},
    },
    "lenet5": {"Sparse momentum": {0.01: 99.17, 0.02: 99.24, 0.05: 99.31, 0.08: 99.355}, "Dense": {1.0: 99.42}},
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=[*FLAGS], default=[*FLAGS], help="default: all")
    add(
        "--methods",
        nargs="+",
        choices=[DENSE, *METHODS],
        default=[DENSE, *METHODS],
        metavar="NAME",
        help="default: all",
    )
    add(
        "--densities",
        nargs="+",
        type=float,
        default=[0.05, 0.01, 0.1, 0.02],
        help="densities in the order of the runs (default: %(default)s)",
    )
    add("--seeds", type=int, default=3, help=f"number of seeds, from {FIRST_SEED} on (default: %(default)s)")
    add("--epochs", type=int, default=100, help="default: %(default)s")
    add("--workers", type=int, default=2, help="processes at a time (default: %(default)s)")
    add("--data-dir", help="folder of the data files (default: that of main.py)")
    add("--run-dir", type=Path, default=Path("runs/results_mnist"), help="folder of the runs (default: %(default)s)")
    add("--csv", type=Path, default=common.RESULTS / "methods_mnist.csv", help="results (default: %(default)s)")
    add("--report", action="store_true", help="only write tables and pictures of the finished runs")
    return parser.parse_args()


def main():
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args.report:
        done = {key(row) for row in read(args.csv)}
        left = [work for work in sweep(args) if key(work) not in done]
        logging.info("%d runs to make, %d are there", len(left), len(done))
        with ThreadPoolExecutor(args.workers) as workers:
            running = [workers.submit(train, args, work) for work in left]
            try:
                for i, run in enumerate(as_completed(running), start=1):
                    logging.info("%d of %d: %s", i, len(left), run.result())
            finally:
                workers.shutdown(cancel_futures=True)  # on Ctrl-C
    report(args)


def sweep(args):
    """Return a dict for each run of the sweep, in the order to run them."""
    return [
        dict(model=model, method=method, density=1.0 if method == DENSE else density, seed=seed, epochs=args.epochs)
        for model in args.models
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
        for i, density in enumerate(args.densities)
        for method in args.methods
        if method != DENSE or i == 0
    ]


def key(row):
    return row["model"], row["method"], float(row["density"]), int(row["seed"]), int(row["epochs"])


def read(path):
    """Return the rows of the CSV file; an empty list if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def train(args, work):
    """Make one run and append it to the CSV file; return a line for the log."""
    kind = ["--dense"] if work["method"] == DENSE else ["--method", work["method"], "--density", str(work["density"])]
    place = args.run_dir / "-".join(str(work[name]) for name in KEY)
    command = [sys.executable, str(SCRIPT), "--data", "mnist", "--model", work["model"], *kind, "--device", "cpu"]
    decay = str(DECAY_STEPS * work["epochs"] // 100)
    command += ["--seed", str(work["seed"]), "--epochs", str(work["epochs"]), "--max-threads", "1"]
    command += ["--decay_frequency", decay, *flags(work["model"], work["method"])]
    command += ["--run-dir", str(place), *(["--data-dir", args.data_dir] if args.data_dir else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}"
    newest = max(place.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    *epochs, test = map(json.loads, newest.read_text().splitlines())
    row = work | dict(
        test_accuracy=test["test_accuracy"],
        active_weights=epochs[-1]["active_weights"],
        exploration_rate=epochs[-1].get("exploration_rate", 1.0),
        seconds=round(sum(epoch["seconds"] for epoch in epochs), 1),
        commit=common.commit(),
        torch=torch.__version__,
    )
    with WRITING:
        append(args.csv, row)
    return " ".join(str(row[name]) for name in COLUMNS[:6])


def flags(model, method):
    drawn = method != DENSE and METHODS[method].sparse_init in DISTRIBUTIONS and METHODS[method].weights == "zero"
    return [flag for flag in FLAGS[model] if flag != "--rescale" or drawn]


def append(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    begins = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if begins:
            writer.writeheader()
        writer.writerow(row)


def report(args):
    """Write a table and a picture of all runs for each model and number of epochs."""
    groups = {}
    for row in read(args.csv):
        groups.setdefault((row["model"], int(row["epochs"])), []).append(row)
    parts = []
    for (model, epochs), rows in groups.items():
        cells = summarise(rows, error)
        seeds = max(len(errors) for errors in cells.values())
        parts += [
            f"MNIST, {' '.join([model, *FLAGS[model]])}, {epochs} epochs: test error in %"
            + (
                f", mean (standard error) over {seeds} seeds; fewer are in square brackets."
                if seeds > 1
                else ", one seed."
            ),
            markdown(cells, PUBLISHED[model], seeds),
            "The same: weights that were active at any time, in % (R_s, the in-time over-parameterisation rate).",
            markdown(summarise(rows, explored), {}, seeds),
        ]
        points = [point(method, density, errors) for (method, density), errors in cells.items()]
        picture = args.csv.with_name(f"{args.csv.stem}-{model}-{epochs}.png")
        plots.plot_accuracy_density(points, picture, by_error=True)
        logging.info("Wrote %s", picture)
    path = args.csv.with_suffix(".md")
    path.write_text("\n\n".join(parts) + "\n")
    logging.info("Wrote %s", path)


def error(row):
    return 100 * (1 - float(row["test_accuracy"]))


def explored(row):
    return 100 * float(row["exploration_rate"])


def summarise(rows, measure):
    """Return {(method, density): values of `measure`, one per seed}, in the order of the table of methods."""
    cells = {}
    for row in rows:
        cells.setdefault((row["method"], float(row["density"])), []).append(measure(row))
    order = [DENSE, *METHODS]
    return dict(sorted(cells.items(), key=lambda cell: (order.index(cell[0][0]), cell[0][1])))


def markdown(cells, published, seeds):
    densities = sorted({density for _, density in cells})
    lines = []
    for method in dict.fromkeys(method for method, _ in cells):
        found = [show(cells.get((method, density)), seeds) for density in densities]
        lines.append([title(method), *found])
    for name, accuracy in published.items():
        found = [f"{100 - accuracy[density]:.2f}" if density in accuracy else "" for density in densities]
        if any(found):
            lines.append([f"{name}, published", *found])
    headers = ["method", *(f"{100 * density:g}%" for density in densities)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def title(method):
    return "Dense" if method == DENSE else METHODS[method].name


def show(values, seeds):
    if not values:
        return ""
    numbers = statistics(values)
    spread = "" if numbers["standard_error"] is None else f" ({numbers['standard_error']:.2f})"
    return f"{numbers['mean']:.2f}{spread}" + (f" [{len(values)}]" if len(values) < seeds else "")


def point(method, density, errors):
    """Return a point of the picture, with the standard error as its bar."""
    numbers = statistics([1 - error / 100 for error in errors])
    mean, error = numbers["mean"], numbers["standard_error"]
    interval = None if error is None else (mean - error, mean + error)
    return dict(label=title(method), density=density, accuracy=mean, interval=interval)


if __name__ == "__main__":
    main()
