"""Train a small language model on this Python's source code with all of its weights, then with 13%, and compare.

    python demo.py           on the standard library of the Python that runs this
    python demo.py TEXT      on a file or a folder of text

The sparse model holds active weights alone (--weights sparse). Prints a table and a text that each wrote, and writes
runs/language-demo.png: validation loss by step, and density per layer.
"""

import argparse
import logging
import sys
from pathlib import Path

import main as script
from tabulate import tabulate

from sparselearning.experiments.report.held_bytes import bytes_held
from sparselearning.experiments.report.text_plots import plot_runs
from sparselearning.flags import positive_int
from sparselearning.parser import ArgumentParser

COMMON = "--layers 2 --width 256 --heads 4 --context 64 --batch-size 8 --lr 0.002 --eval-windows 128"
RUNS = {"dense": "--dense", "sparse": "--method rigl --layer-density attention=0.2,mlp=0.1 --weights sparse"}


class Samples(logging.Handler):
    """Keeps what runs log as their samples."""

    def __init__(self):
        super().__init__()
        self.last = ""

    def emit(self, record):
        text = record.getMessage()
        self.last = text.removeprefix("Sample:\n") if text.startswith("Sample:\n") else self.last


def demo(text, steps, prompt, run_dir):
    """Make both runs; return label -> folder, and label -> sample."""
    folders, written, samples = {}, {}, Samples()
    every = steps // 8 if steps % 8 == 0 else steps
    script.logger.addHandler(samples)
    script.logger.setLevel(logging.INFO)
    for label, choice in RUNS.items():
        settings = f"{COMMON} {choice} --steps {steps} --eval-every {every}"
        print(f"Training the {label} model: main.py {settings}", flush=True)
        args = [*settings.split(), "--data", text, "--run-dir", str(run_dir)]
        args += ["--sample", prompt, "--sample-tokens", "200"]
        folders[label] = script.run(script.parse_arguments(args))
        written[label] = samples.last
    script.logger.removeHandler(samples)
    return folders, written


def row(label, folder):
    """Return a line of the table: loss, bits per byte, active weights, tokens per second, megabytes."""
    last = folder.metrics[-1]
    speed = sorted(record["tokens_per_second"] for record in folder.metrics)[len(folder.metrics) // 2]
    return [
        label,
        f"{last['valid_loss']:.3f}",
        f"{last['valid_bits_per_byte']:.3f}",
        f"{last['active_weights']:,}",
        f"{speed:,.0f}",
        f"{bytes_held(folder.checkpoint) / 1e6:.2f}",
    ]


def main():
    parser = ArgumentParser("demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="python", metavar="TEXT", help="text (default: this Python's)")
    parser.add_argument("--steps", type=positive_int, default=400, help="steps per run (default: 400)")
    parser.add_argument("--prompt", default="def ", help="what the texts go on from (default: 'def ')")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where to write (default: runs)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("language").propagate = False
    folders, samples = demo(args.text, args.steps, args.prompt, args.run_dir)
    picture = args.run_dir / "language-demo.png"
    plot_runs({label: folder.metrics for label, folder in folders.items()}, picture)
    headers = ["model", "loss, nats", "bits per byte", "active weights", "tokens per second", "MB held"]
    print(tabulate([row(*run) for run in folders.items()], headers, disable_numparse=True))
    print("Active weights are those of attention and MLPs. Held are weights, gradients and optimizer state of all.")
    for label, text in samples.items():
        print(f"\nThe {label} model writes:\n{text}")
    print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
