"""Bytes of process memory per dense weight of dense, masked and sparse training, steady and at their peak.

    python benchmarks/memory.py
    python benchmarks/memory.py --quick
    python benchmarks/memory.py --sparselab /tmp/sparselab/bin/python

Four linear layers of --width inputs and outputs, AdamW, RigL every 4 steps, 64 rows a step. Each row is a process of
its own. Counted is the memory that a process has beyond what it had after imports and a small training with an update.
`steady` is the median of the resident size between two updates, after the third; `peak` is the largest resident size
that the operating system saw from the first step on. `start` says where a sparse model comes from: `dense`, a model on
the CPU whose weights are given up by `add_module`, or `meta`, one on the meta device. --sparselab names a Python
in whose environment SparseLab is installed (pip install sparselab==0.2.2); without it those rows are left out.
"""

import ctypes
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path

KINDS = {
    "dense": dict(kind="dense"),
    "masks": dict(kind="zero", density=0.05),
    "sparse, from dense, 0.05": dict(kind="sparse", density=0.05, start="dense"),
    "sparse, from dense, 0.01": dict(kind="sparse", density=0.01, start="dense"),
    "sparse, from meta, 0.05": dict(kind="sparse", density=0.05, start="meta"),
    "sparse, from meta, 0.01": dict(kind="sparse", density=0.01, start="meta"),
    "SparseLab SET, 0.05": dict(kind="SET", density=0.05),
    "SparseLab RigL, 0.05": dict(kind="RigL", density=0.05),
    "SparseLab RigL, 0.01": dict(kind="RigL", density=0.01),
}
OTHERS = ("SET", "RigL")
LAYERS, BATCH, EVERY = 4, 64, 4
STEPS = 6 * EVERY + 2  # the last updates of which are counted


def main():
    """Measure, log and save."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    import common

    args = common.parse(
        __doc__, rounds=3, width=(4096, "inputs and outputs of a layer"), sparselab=("", "a Python that has SparseLab")
    )
    args.width = 512 if args.quick else args.width
    rows = []
    for name, settings in KINDS.items():
        python = args.sparselab if settings["kind"] in OTHERS else sys.executable
        if not python:
            logging.info("%-26s left out: no SparseLab", name)
            continue
        settings = settings | dict(width=args.width, threads=args.threads)
        command = [python, __file__, "--measure", json.dumps(settings)]
        found = [subprocess.run(command, capture_output=True, text=True) for _ in range(args.rounds)]
        if failed := next((each for each in found if each.returncode), None):
            logging.info("%-26s left out: %s", name, failed.stderr.strip().splitlines()[-1])
            continue
        results = [json.loads(each.stdout.splitlines()[-1]) for each in found]
        row = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append(dict(row=name, **settings, **row))
        logging.info("%-26s steady %6.2f, peak %6.2f, building %6.2f bytes per weight", name, *row.values())
    common.save(args, "memory", rows)


def measure(kind, width, threads, density=1.0, start="dense"):
    """Return bytes per dense weight: between updates, at the peak of training, and at the peak of building."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    for each in ("dense", kind):
        train(*build(each, 64, 0.25, "dense"), 64, 2 * EVERY + 1)
    before, weights = reset(), LAYERS * width**2
    if kind == "sparse":  # as the scripts do before they build a model; in a new process it is so anyway
        from sparselearning.native.allocator import lay_large_blocks_apart

        lay_large_blocks_apart()
    model, step = build(kind, width, density, start)
    building = status("VmHWM")
    reset()
    sizes = train(model, step, width, STEPS)
    peak = status("VmHWM")
    counted = {"steady": statistics.median(sizes[3 * EVERY :]), "peak": peak, "building": building}
    return {name: (number - before) / weights for name, number in counted.items()}


def train(model, step, width, steps):
    """Make training steps; return the resident size after each of them, with its gradients."""
    import torch

    sizes = []
    for _ in range(steps):
        x, y = torch.randn(BATCH, width), torch.randn(BATCH, width)
        torch.nn.functional.mse_loss(model(x), y).backward()
        step()
        sizes.append(status("VmRSS"))
        model.zero_grad()
    return sizes


def build(kind, width, density, start):
    """Return a model and the function that steps its optimizer, and updates the masks after every fourth step."""
    import torch

    if kind in OTHERS:
        return build_other(kind, width, density)
    with torch.device("meta" if start == "meta" else "cpu"):
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if kind != "dense":
        from sparselearning import Masking

        modes = dict(prune_mode="magnitude", growth_mode="gradient", redistribution_mode="none")
        Masking(optimizer, None, **modes, prune_every_k_steps=EVERY, weights=kind).add_module(model, density)
    return model, optimizer.step


def build_other(kind, width, density):
    """Return the same of SparseLab, with its algorithm."""
    import sparselab
    import torch

    layers = [sparselab.SparseLinear(width, width, bias=False, sparsity=1 - density) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers)
    algorithm = getattr(sparselab, kind)(sparsity=1 - density, drop_fraction=0.3, update_freq=EVERY)
    model.apply(lambda part: part.apply(algorithm) if isinstance(part, sparselab.SparseLinear) else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step():
        optimizer.step()
        algorithm.step()

    return model, step


def reset():
    """Give free memory back, and let the peak begin anew; return the resident size."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name):
    """Return a number of bytes that the operating system tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
