"""Training by the user's own command: images per second of main.py, dense, masked, and masked on sparse kernels.

    python benchmarks/epoch.py
    python benchmarks/epoch.py --quick

Each measurement is one epoch of `mnist_cifar/main.py` in a process of its own, with the script's default settings and
the default instruction set; the kinds take turns. The rate is the one that the run writes into metrics.jsonl: steps of
training alone, without evaluation. Images are random, in files of the formats of MNIST and CIFAR-10.
"""

import gzip
import json
import logging
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np

from sparselearning.experiments.data.files import CIFAR_FILES, MNIST_FILES

MAIN = Path(__file__).parent.parent / "mnist_cifar" / "main.py"
DENSITY = 0.05
# {model: (data set, training images of an epoch)}; a tenth of the files' images is for validation.
EPOCHS = {"lenet5": ("mnist", 20_000), "vgg-d": ("cifar", 2_500), "wrn-16-8": ("cifar", 1_000)}
KINDS = {
    "dense": ["--dense"],
    "masked": ["--density", str(DENSITY)],
    "sparse kernels": ["--density", str(DENSITY), "--sparse-backend", "cpu"],
}


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=5)
    names = ["lenet5"] if args.quick else list(EPOCHS)
    common.save(args, "epoch", [measure(args, name) for name in names])


def measure(args, name):
    """Return a row: the images per second of one network, trained in each way."""
    data, count = EPOCHS[name]
    count = 1_000 if args.quick else count
    rates = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "data"
        (write_mnist if data == "mnist" else write_cifar)(files, count * 10 // 9)
        command = [sys.executable, MAIN, "--data", data, "--data-dir", files, "--model", name, "--epochs", "1"]
        command += ["--max-threads", str(args.threads), "--run-dir"]
        for number in range(args.rounds):
            for kind, flags in KINDS.items():
                run = Path(place) / f"{kind}-{number}"
                rates[kind].append(train([*command, run, *flags], run))
    seconds = {kind: [1 / rate for rate in values] for kind, values in rates.items()}
    row = {
        "model": name,
        "images": count,
        "density": DENSITY,
        "images per second": {kind: 1 / common.summary(values)["median"] for kind, values in seconds.items()},
        "masked / sparse kernels": common.ratio(seconds["masked"], seconds["sparse kernels"]),
        "dense / sparse kernels": common.ratio(seconds["dense"], seconds["sparse kernels"]),
        "ranges": {kind: [min(values), max(values)] for kind, values in rates.items()},
    }
    for kind, rate in row["images per second"].items():
        logging.info("%-12s %-16s %9.0f images/s", name, kind, rate)
    common.log_ratios(name, row)
    return row


def train(command, place):
    """Run main.py; return the images per second of its epoch."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    (folder,) = place.iterdir()
    epoch = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return epoch["images_per_second"]


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
