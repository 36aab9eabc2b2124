"""Train LeNet-300-100 on scikit-learn's digits with 5% of its weights, then with all of them, and compare.

    python demo.py

Prints a table and writes runs/demo.png: accuracy per epoch, and density per layer per epoch.
"""

import argparse
import logging
import sys
from pathlib import Path

import main as script
from tabulate import tabulate

from sparselearning.experiments.report.plots import plot_demo
from sparselearning.flags import positive_int
from sparselearning.parser import ArgumentParser

COMMON = "--data digits --model lenet300-100 --decay_frequency 900 --max-threads 1"


def demo(epochs, run_dir):
    """Make both runs and return label -> metrics."""
    runs = {}
    for label, choice in {"sparse": "--density 0.05", "dense": "--dense"}.items():
        print(f"Training the {label} network: main.py {COMMON} {choice} --epochs {epochs}", flush=True)
        args = script.parse_arguments([*f"{COMMON} {choice} --epochs {epochs}".split(), "--run-dir", str(run_dir)])
        runs[label] = script.run(args).metrics
    return runs


def row(label, metrics):
    """Return a line of the table: density, active weights, test accuracy, seconds of training."""
    *epochs, test = metrics
    active = epochs[-1]["active_weights"]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    return [label, f"{epochs[-1]['density']:.2f}", f"{active:,}", f"{test['test_accuracy']:.2%}", f"{seconds:.1f}"]


def main():
    parser = ArgumentParser("demo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=positive_int, default=100, help="epochs per run (default: 100)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where to write (default: runs)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    runs = demo(args.epochs, args.run_dir)
    picture = args.run_dir / "demo.png"
    plot_demo(runs, picture)
    headers = ["network", "density", "active weights", "test accuracy", "seconds"]
    print(tabulate([row(*run) for run in runs.items()], headers, disable_numparse=True))
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
