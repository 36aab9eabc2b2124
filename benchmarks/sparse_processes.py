"""Bytes that each process sends in a step of training, with masks and with active weights alone.

    python benchmarks/sparse_processes.py
    python benchmarks/sparse_processes.py --width 4096
    python benchmarks/sparse_processes.py --quick

Three linear layers of `width` x `width` weights at 5% and 1%, 64 rows for each process, in DistributedDataParallel over
Gloo, on 1, 2 and 4 processes of one thread each; masks move every 100 steps, by the gradient or by momentum. Counted
are the numbers that the library hands over: an all-reduce of n numbers counts as n. With masks these are the gradients
of all parameters. Measured is what passes the loopback interface, divided by processes and steps: the headers of
messages count too, and what other programs send. Updates are spread over the steps.
"""

import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from sparselearning import CosineDecay, Masking
from sparselearning.processes import distributed

EVERY, ROWS, LAYERS = 100, 64, 3
WAYS = [
    ("gradient", 0.05, "zero"),
    ("gradient", 0.05, "sparse"),
    ("gradient", 0.01, "sparse"),
    ("momentum", 0.05, "sparse"),
]
LOOPBACK = Path("/proc/net/dev")


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=1, width=(1024, "rows and columns of a layer"))
    args.width = 128 if args.quick else args.width
    rows = []
    for processes in (1, 2, 4):
        for way in WAYS if processes > 1 else WAYS[:2]:
            rows.append(measure(args, processes, *way))
            logging.info("%s", "  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    common.save(args, "sparse_processes" + (f"-{args.width}" if args.width > 1024 else ""), rows)


def measure(args, processes, growth, density, weights):
    """Return a row: the traffic of a step."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (folder, processes, args.width, growth, density, weights, args.rounds), processes)
        return torch.load(Path(folder) / "row.pt")


def train(rank, folder, processes, width, growth, density, weights, rounds):
    """Train `rounds` times as long as masks stay; the first process writes the row."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    modes = dict(growth_mode=growth, redistribution_mode="momentum" if growth == "momentum" else "nonzeros")
    masking = Masking(optimizer, CosineDecay(0.3, 10_000), prune_every_k_steps=EVERY, weights=weights, **modes)
    masking.add_module(model, density=density)
    network = distributed.replicate(model)
    torch.manual_seed(rank)
    seconds, before, sent = [], loopback(), 0.0
    for _ in range(rounds * EVERY):
        began = time.perf_counter()
        masking.zero_grad()
        network(torch.randn(ROWS, width)).square().mean().backward()
        masking.step()
        seconds.append(time.perf_counter() - began)
    if processes > 1:
        dist.barrier()
        dense = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
        own = masking.held.bytes_per_step
        sent = 4.0 * (dense + (LAYERS * width**2 if own is None else 0)) + (own or 0.0)
    if rank == 0:
        row = dict(processes=processes, weights=weights, growth=growth, density=density, active=masking.total_nonzero)
        row |= {"bytes per step, counted": round(sent)}
        row |= {"bytes per step and active weight, counted": round(sent / masking.total_nonzero, 3)}
        row |= {"bytes per step, loopback": round((loopback() - before) / processes / len(seconds))}
        row |= {"seconds per step": round(statistics.median(seconds), 5)}
        torch.save(row, Path(folder) / "row.pt")
    distributed.stop()


def loopback():
    """Return the bytes that have passed the loopback interface."""
    line = next(line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


if __name__ == "__main__":
    main()
