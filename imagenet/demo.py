"""Train ResNet-18 on small photographs with 20% of its weights, then with all of them, and compare.

    python demo.py           on 800 generated images of ten kinds of stripes
    python demo.py DIR       on a folder with train/<class>/<image> and val/<class>/<image>

Prints a table and writes runs/imagenet-demo.png: accuracy per epoch, and density per layer per epoch.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import main as script
import numpy as np
from PIL import Image
from tabulate import tabulate

from sparselearning.experiments.report.plots import plot_demo
from sparselearning.flags import positive_int
from sparselearning.parser import ArgumentParser

COMMON = "--recipe tuned --arch resnet18 --lr 0.4 --workers 1"
CLASSES = 10


def draw(label, random):
    """Return a picture of stripes, uint8 [H, W, 3]: the class decides on direction and colour, the rest is chance."""
    height, width = random.integers(60, 100, 2)
    angle = np.pi * (label % 5 + random.uniform(-0.3, 0.3)) / 5
    y, x = np.mgrid[:height, :width]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * random.uniform(0.3, 0.6) + random.uniform(0, 6))
    colour = np.array([200, 120, 60] if label < 5 else [60, 120, 200])
    pixels = colour * (0.6 + 0.4 * wave[:, :, None]) + random.normal(0, 30, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def generate(folder, train):
    """Write pictures as JPEG, `train` of each class and a third of it for validation, and return the folder."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", max(train // 3, 1))):
        for label in range(CLASSES):
            place = Path(folder) / part / f"stripes{label}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw(label, random)).save(place / f"{i}.jpg", quality=90)
    return folder


def demo(folder, epochs, image_size, run_dir):
    """Make both runs and return label -> metrics."""
    runs = {}
    for label, choice in {"sparse": "--density 0.2", "dense": "--dense"}.items():
        settings = f"{COMMON} {choice} --epochs {epochs} --image-size {image_size} --batch-size 32"
        print(f"Training the {label} network: main.py DIR {settings}", flush=True)
        args = script.parse_arguments([str(folder), *settings.split(), "--run-dir", str(run_dir)])
        runs[label] = script.run(args).metrics
    return runs


def row(label, metrics):
    """Return a line of the table: density, active weights, top-1 accuracy, seconds."""
    last = metrics[-1]
    seconds = sum(epoch["seconds"] for epoch in metrics)
    return [
        label,
        f"{last['density']:.2f}",
        f"{last['active_weights']:,}",
        f"{last['valid_accuracy']:.2%}",
        f"{seconds:.1f}",
    ]


def main():
    parser = ArgumentParser("demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="photographs (default: generated ones)")
    parser.add_argument("--pictures", type=positive_int, default=60, help="generated ones per class (default: 60)")
    parser.add_argument("--epochs", type=positive_int, default=8, help="epochs per run (default: 8)")
    parser.add_argument("--image-size", type=positive_int, default=32, help="side of an image (default: 32 pixels)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where to write (default: runs)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as scratch:
        runs = demo(args.folder or generate(scratch, args.pictures), args.epochs, args.image_size, args.run_dir)
    picture = args.run_dir / "imagenet-demo.png"
    plot_demo(runs, picture)
    headers = ["network", "density", "active weights", "top-1 accuracy", "seconds"]
    print(tabulate([row(*run) for run in runs.items()], headers, disable_numparse=True))
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
