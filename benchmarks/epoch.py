"""Training by the user's own command: images per second of main.py, dense, masked, and masked on sparse kernels.

    python benchmarks/epoch.py
    python benchmarks/epoch.py --quick

Each measurement is `mnist_cifar/main.py` in a process of its own, with the script's default settings and the default
instruction set, ended by SIGTERM after some seconds; the kinds take turns. The rate is that of the steps of training,
from the run's metrics and checkpoint, without start, evaluation and updates of the masks. The last 20 steps of an epoch
(450 of CIFAR-10) compute dense gradients too: the last kind updates the masks every 20 steps, so that each of its steps
is such a step. Images are random, in files of the formats and sizes of MNIST and CIFAR-10.
"""

import gzip
import json
import logging
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np

from sparselearning import checkpoint
from sparselearning.experiments.data.files import CIFAR_FILES, MNIST_FILES

MAIN = Path(__file__).parent.parent / "mnist_cifar" / "main.py"
DENSITY = 0.05
BATCH = 100  # main.py's default
# {model: (data set, seconds of a run)}
RUNS = {"lenet5": ("mnist", 20), "vgg-d": ("cifar", 30), "wrn-16-8": ("cifar", 60)}
IMAGES = {"mnist": 60_000, "cifar": 50_000}
SPARSE = ["--density", str(DENSITY), "--sparse-backend", "cpu"]
KINDS = {
    "dense": ["--dense"],
    "masked": ["--density", str(DENSITY)],
    "sparse kernels": SPARSE,
    "sparse kernels, observing": [*SPARSE, "--prune-every-k-steps", "20"],
}


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=5, models=(",".join(RUNS), "networks, with commas between"))
    names = ["lenet5"] if args.quick else args.models.split(",")
    common.save(args, "epoch", [measure(args, name) for name in names])


def measure(args, name):
    """Return a row: the images per second of one network, trained in each way."""
    data, duration = RUNS[name]
    count, duration = (1_000, None) if args.quick else (IMAGES[data], duration)
    rates = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "data"
        (write_mnist if data == "mnist" else write_cifar)(files, count)
        command = [sys.executable, MAIN, "--data", data, "--data-dir", files, "--model", name]
        command += ["--epochs", "1"] if args.quick else []
        command += ["--max-threads", str(args.threads), "--run-dir"]
        for number in range(args.rounds):
            for kind, flags in KINDS.items():
                run = Path(place) / f"{kind}-{number}"
                rates[kind].append(train([*command, run, *flags], run, duration))
    seconds = {kind: [1 / rate for rate in values] for kind, values in rates.items()}
    row = {
        "model": name,
        "images": count,
        "density": DENSITY,
        "images per second": {kind: 1 / common.summary(values)["median"] for kind, values in seconds.items()},
        "ranges": {kind: [min(values), max(values)] for kind, values in rates.items()},
        "masked / sparse kernels": common.ratio(seconds["masked"], seconds["sparse kernels"]),
        "dense / sparse kernels": common.ratio(seconds["dense"], seconds["sparse kernels"]),
        "observing / not": common.ratio(seconds["sparse kernels, observing"], seconds["sparse kernels"]),
    }
    for kind, rate in row["images per second"].items():
        logging.info("%-12s %-26s %9.0f images/s", name, kind, rate)
    common.log_ratios(name, row)
    return row


def train(command, place, duration):
    """Run main.py for `duration` seconds, or to its end; return the images per second of its steps."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    if duration is not None:
        time.sleep(duration)
        started.terminate()
    _, said = started.communicate()
    if started.returncode not in (0, 143):
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {started.returncode}: {said.decode()[-500:]}")
    (folder,) = place.iterdir()
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if rates := [epoch["images_per_second"] for epoch in epochs if "images_per_second" in epoch]:
        return statistics.median(rates)
    progress = checkpoint.load(folder / "checkpoint.pt")["progress"]
    return progress["steps"] * BATCH / progress["seconds"]


def write_mnist(place, count):
    """Write random images in MNIST's format: `count` for training, 100 for the test."""
    place.mkdir()
    random = np.random.default_rng(0)
    for name in MNIST_FILES:
        number = count if name.startswith("train") else 100
        shape, values = ((number, 28, 28), 256) if "images" in name else ((number,), 10)
        header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        content = header + random.integers(0, values, shape, dtype=np.uint8).tobytes()
        (place / f"{name}.gz").write_bytes(gzip.compress(content))


def write_cifar(place, count):
    """Write random images in CIFAR-10's binary format: `count` in five files for training, a fifth for the test."""
    folder = place / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in CIFAR_FILES:
        records = random.integers(0, 256, (count // 5, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())


if __name__ == "__main__":
    main()
