"""Training steps on a CPU, with freed memory returned to the system (as glibc does) and kept for the next step.

    python benchmarks/allocator.py

Each measurement runs in its own process, because the setting cannot be undone; the two kinds take turns. Measured are
dense networks, and a network and a layer on the sparse kernels.
"""

import json
import logging
import resource
import statistics
import subprocess
import sys
import time

import common
import torch
from sparse_layers import both, prune
from torch.nn.functional import cross_entropy

from sparselearning import Masking, models
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.sparse import SparseConv2d, interface
from sparselearning.sparse.memory_order import in_order

LAYER = "conv 64@32"
CASES = [
    *(("lenet5", 100, False), ("wrn-16-8", 32, False), ("vgg-d", 32, False)),
    *(("vgg-d", 32, True), (LAYER, 32, True)),
]
STEPS = 8


def main():
    """Measure, log and save."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return
    args = common.parse(__doc__, rounds=5)
    rows = []
    for model, images, sparse in CASES[: 1 if args.quick else None]:
        found = {"returned": [], "kept": []}
        for _ in range(args.rounds):
            for kind, results in found.items():
                settings = json.dumps([model, images, sparse, kind == "kept", args.threads])
                command = [sys.executable, __file__, "--measure", settings]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = dict(model=model, images=images, sparse=sparse)
        for kind, results in found.items():
            row |= {f"{kind}_{part}": statistics.median(result[part] for result in results) for part in results[0]}
        seconds = [[result["ms"] for result in results] for results in found.values()]
        row["ratio"] = common.ratio(*seconds)
        rows.append(row)
        logging.info(
            "%-12s %s  returned %7.1f ms, %6d page faults, %5d MB   kept %7.1f ms, %6d, %5d MB   ratio %.2f",
            model, "sparse" if sparse else "dense ", *(row[f"{kind}_{part}"] for kind in found for part in results[0]),
            row["ratio"],
        )  # fmt: skip
    common.save(args, "allocator", rows)


def measure(name, images, sparse, keep, threads):
    """Return the median milliseconds of a step, its page faults, and the peak memory of the process in MB."""
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    else:
        interface.keep_memory = lambda: None
    torch.manual_seed(0)
    step = layer_step(images) if name == LAYER else model_step(name, images, sparse)
    for _ in range(3):
        step()
    before, milliseconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        milliseconds.append(1e3 * (time.perf_counter() - started))
    used = resource.getrusage(resource.RUSAGE_SELF)
    return dict(
        ms=statistics.median(milliseconds), faults=(used.ru_minflt - before) / STEPS, memory=used.ru_maxrss >> 10
    )


def model_step(name, images, sparse):
    """Return a training step of a network."""
    model = models.build(name)
    x = torch.randn(images, *common.input_shape(name))
    y = torch.randint(10, (images,))
    if not sparse:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    if sparse:
        Masking(optimizer, None, weights="sparse").add_module(model, density=0.05)

    def step():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def layer_step(images):
    """Return a forward and backward pass of one sparse convolution."""
    layer = torch.nn.Conv2d(64, 64, 3, padding=1)
    prune(layer, 0.05)
    return both(SparseConv2d.from_dense(layer), in_order(torch.randn(images, 64, 32, 32), True))


if __name__ == "__main__":
    main()
