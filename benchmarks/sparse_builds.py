"""Builds of the sparse kernels against each other, for whoever changes them.

    g++ -std=c++17 -O3 -fPIC -shared -fvisibility=hidden -Wno-psabi sparselearning/native/kernels/*.cpp -o /tmp/new.so
    python benchmarks/sparse_builds.py --builds /tmp/old.so,/tmp/new.so
    python benchmarks/sparse_builds.py --builds /tmp/old.so,/tmp/new.so --networks "wrn-16-8 0.05 b32,vgg-d"

The builds take turns on the same layers, and a dense one is called before each turn, so that they find in the caches
what a network leaves there. A ratio is how many times faster than the first a build is. `--networks` takes whole
networks after `convert` instead: rows of engines.py, whose layers find their input in memory where it is large.
"""

import logging
from pathlib import Path

import common
import torch
from peers.rows import chosen, network
from sparse_layers import CONVOLUTIONS, LINEARS, both, forward, prune
from torch import nn

from sparselearning.native import library
from sparselearning.sparse import SparseConv2d, SparseLinear, convert
from sparselearning.sparse.memory_order import in_order, is_batch_last


def main():
    """Measure, log and save."""
    more = dict(
        builds=("", "files, with commas between"),
        images=(32, "per call"),
        rows=(128, "of a linear layer"),
        convolutions=(
            ",".join(f"{channels}@{size}" for channels, size in CONVOLUTIONS),
            "channels @ height and width of 3x3 convolutions",
        ),
        networks=("", "parts of the names of rows of engines.py, with commas between, instead of layers"),
        linears=(",".join(f"{features}x{features}" for features in LINEARS), "inputs x outputs of linear layers"),
    )
    args = common.parse(__doc__, rounds=15, densities=("0.05,0.02", "with commas between"), **more)
    builds = {Path(file).stem: library.Library(Path(file)) for file in args.builds.split(",")}
    convolutions = [(f"conv {size}", convolution, (size, args.images)) for size in args.convolutions.split(",") if size]
    linears = [(f"linear {size}", linear, (size, args.rows)) for size in args.linears.split(",") if size]
    args.builds = list(builds)
    if args.networks:
        torch.set_num_threads(args.threads)
        rows = [measure_network(args, builds, row) for row in chosen(args.networks)]
        return common.save(args, "sparse_builds", rows)
    rows = []
    for threads in [1] if args.threads == 1 else [1, args.threads]:
        torch.set_num_threads(threads)
        for name, make, sizes in convolutions[:1] if args.quick else convolutions + linears:
            for density in [0.05] if args.quick else map(float, args.densities.split(",")):
                row = measure(args, builds, *make(*sizes, density))
                rows.append(dict(layer=name, density=density, threads=threads) | row)
                logging.info(" ".join(f"{key}={value}" for key, value in rows[-1].items()))
    common.save(args, "sparse_builds", rows)


def convolution(size, images, density):
    """Return a dense layer, its sparse form and an input; `size` is "channels @ height and width", without spaces."""
    channels, size = map(int, size.split("@"))
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    prune(layer, density)
    return layer, SparseConv2d.from_dense(layer), torch.randn(images, channels, size, size)


def linear(size, rows, density):
    """Return a dense layer, its sparse form and an input; `size` is "inputs x outputs", without spaces."""
    inputs, outputs = map(int, size.split("x"))
    layer = nn.Linear(inputs, outputs)
    prune(layer, density)
    return layer, SparseLinear.from_dense(layer), torch.randn(rows, inputs)


def measure(args, builds, layer, sparse, inputs):
    """Return the ratios of one layer, forward and with its backward pass."""
    x = in_order(inputs, is_batch_last(len(inputs)))
    row = {}
    for part, call in (("forward", forward(sparse, x)), ("both", both(sparse, x))):
        calls = {name: by(build, call) for name, build in builds.items()}
        seconds = common.alternate(calls, args.rounds, calls=3, prepare=forward(layer, inputs))
        first = next(iter(seconds.values()))
        row |= {f"{part}_{name}": round(common.ratio(first, values), 3) for name, values in seconds.items()}
        row |= {
            f"{part}_{name}_ms": round(1e3 * common.summary(values)["median"], 3) for name, values in seconds.items()
        }
    return row


@torch.no_grad()
def measure_network(args, builds, row):
    """Return the ratios of a network of engines.py."""
    model, x = network(row)
    fast, _ = convert(model, x)
    seconds = common.alternate({name: by(build, lambda: fast(x)) for name, build in builds.items()}, args.rounds)
    first = next(iter(seconds.values()))
    found = dict(network=row.name, threads=args.threads)
    found |= {name: round(common.ratio(first, values), 3) for name, values in seconds.items()}
    found |= {f"{name}_ms": round(1e3 * common.summary(values)["median"], 1) for name, values in seconds.items()}
    logging.info(" ".join(f"{key}={value}" for key, value in found.items()))
    return found


def by(build, call):
    """Return the call, made by this build."""

    def made():
        library.LIBRARY = build
        call()

    return made


if __name__ == "__main__":
    main()
