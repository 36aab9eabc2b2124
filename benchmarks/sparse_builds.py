"""Builds of the sparse kernels against each other, for whoever changes them.

    cd sparselearning/sparse/kernels
    g++ -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -Wno-psabi kernels.cpp -o /tmp/new.so
    python benchmarks/sparse_builds.py --builds /tmp/old.so,/tmp/new.so

The builds take turns on the same convolutions, and a dense one is called before each turn, so that they find in the
caches what a network leaves there. A ratio is how many times faster than the first a build is.
"""

import logging
from pathlib import Path

import common
import torch
from sparse_layers import CONVOLUTIONS, both, forward, prune
from torch import nn

from sparselearning.sparse import SparseConv2d, library, ops


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=15, builds=("", "files, with commas between"), images=(32, "images per call"))
    builds = {Path(file).stem: library.Library(Path(file)) for file in args.builds.split(",")}
    args.builds = list(builds)
    rows = []
    for threads in [1] if args.threads == 1 else [1, args.threads]:
        torch.set_num_threads(threads)
        for channels, size in CONVOLUTIONS[: 1 if args.quick else None]:
            for density in [0.05] if args.quick else [0.05, 0.02]:
                rows.append(measure(args, builds, channels, size, density) | dict(threads=threads))
                logging.info(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    common.save(args, "sparse_builds", rows)


def measure(args, builds, channels, size, density):
    """Return the ratios of one convolution, forward and with its backward pass."""
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    images = torch.randn(args.images, channels, size, size)
    prune(layer, density)
    sparse, x = SparseConv2d.from_dense(layer), ops.in_order(images, ops.is_batch_last(len(images)))
    row = dict(layer=f"conv {channels}@{size}", density=density)
    for part, call in (("forward", forward(sparse, x)), ("both", both(sparse, x))):
        calls = {name: by(build, call) for name, build in builds.items()}
        seconds = common.alternate(calls, args.rounds, calls=3, prepare=forward(layer, images))
        first = next(iter(seconds.values()))
        row |= {f"{part}_{name}": round(common.ratio(first, values), 3) for name, values in seconds.items()}
        row |= {
            f"{part}_{name}_ms": round(1e3 * common.summary(values)["median"], 3) for name, values in seconds.items()
        }
    return row


def by(build, call):
    """Return the call, made by this build."""

    def made():
        library.LIBRARY = build
        call()

    return made


if __name__ == "__main__":
    main()
