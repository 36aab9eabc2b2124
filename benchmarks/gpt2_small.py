"""Tokens per second and memory of GPT-2 small in training: dense, with masks, and on sparse kernels.

    python benchmarks/gpt2_small.py
    python benchmarks/gpt2_small.py --quick

GPT-2 small (124 million parameters, the head its embedding), random tokens of its vocabulary of 50,257, context 128,
batch 4, AdamW; attention has 30% of its weights and the MLPs 10%, with SET every 10 steps. Each kind is a process of
its own, and the kinds take turns. Speed is that of the median step of --steps; memory is the largest resident size
beyond that of the process with its imports, and what weights, gradients and optimizer state take. Writes
results/gpt2_small-cpu.json.
"""

import json
import logging
import statistics
import subprocess
import sys
import time

KINDS = {"dense": None, "masks": "zero", "sparse": "sparse"}
DENSITY = {"*attention*": 0.3, "*mlp*": 0.1}


def main():
    """Measure, log and save."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    import common

    args = common.parse(__doc__, rounds=2, steps=(20, "steps of a run"), batch=(4, "texts of a step"))
    sizes = dict(vocabulary=50257, layers=12, width=768, heads=12, context=128)
    if args.quick:
        sizes = dict(vocabulary=500, layers=2, width=64, heads=2, context=32)
    found = {name: [] for name in KINDS}
    for _ in range(args.rounds):
        for name, weights in KINDS.items():
            given = dict(sizes=sizes, weights=weights, steps=args.steps, batch=args.batch, threads=args.threads)
            command = [sys.executable, __file__, "--measure", json.dumps(given)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        row = dict(kind=name) | {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for key in ("tokens_per_second", "peak_mb", "held_mb") if name != "dense" else ():
            pairs = zip(runs, found["dense"], strict=True)
            row[f"{key} / dense"] = round(statistics.median(one[key] / other[key] for one, other in pairs), 3)
        rows.append(row)
        logging.info("%-8s %s", name, json.dumps(row))
    common.save(args, "gpt2_small", rows)


def measure(sizes, weights, steps, batch, threads):
    """Return what one kind takes in this process."""
    import common
    import torch
    from torch.nn import functional as F

    from sparselearning import Masking
    from sparselearning.models.gpt import GPT
    from sparselearning.native.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    began = common._status("VmRSS")
    model = GPT(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if weights is not None:
        parts = dict(prune_every_k_steps=10, density=DENSITY, weights=weights)
        Masking.from_method("set", model, optimizer, steps, **parts)
    seconds = []
    for _ in range(steps):
        text = torch.randint(sizes["vocabulary"], (batch, sizes["context"] + 1))
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    held = {id(tensor): tensor for tensor in model.parameters()}
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    tensors = [*held.values(), *(p.grad for p in held.values() if p.grad is not None), *states]
    return dict(
        tokens_per_second=round(batch * sizes["context"] / statistics.median(seconds), 1),
        peak_mb=round((common._status("VmHWM") - began) / 1e6, 1),
        held_mb=round(sum(tensor.nbytes for tensor in tensors) / 1e6, 1),
        parameters=sum(p.numel() for p in held.values()),
    )


if __name__ == "__main__":
    main()
