"""Time of an update of the masks, and of a step, with masks and with active weights alone.

    python benchmarks/sparse_update.py
    python benchmarks/sparse_update.py --quick

Four linear layers of --width inputs and outputs, AdamW, 64 rows a step, an update after every step. Masked and sparse
training take turns.
"""

import logging
import statistics
import time

import common
import torch

from sparselearning import Masking

KINDS = {"masked": "zero", "sparse": "sparse"}
CASES = [("gradient", 0.05), ("gradient", 0.01), ("random", 0.05), ("random", 0.01)]
LAYERS, ROWS, WARM = 4, 64, 3


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=9, width=(4096, "inputs and outputs of a layer"))
    args.width = 512 if args.quick else args.width
    rows = []
    for growth, density in CASES:
        seconds = measure(args.width, growth, density, args.rounds)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = {part: ratio(seconds, part) for part in ("step", "update")}
        rows.append(dict(growth=growth, density=density, ratio=ratios, seconds=medians))
        logging.info("%-8s %.2f: sparse over masked: step %.2f, update %.2f", growth, density, *ratios.values())
    common.save(args, "sparse_update", rows)


def ratio(seconds, part):
    """Return the median ratio of the times of a part, sparse over masked."""
    pairs = zip(seconds[f"sparse {part}"], seconds[f"masked {part}"], strict=True)
    return round(statistics.median(sparse / masked for sparse, masked in pairs), 3)


def measure(width, growth, density, rounds):
    """Return (kind and part) -> seconds of each round."""
    runs = {name: build(width, growth, density, weights) for name, weights in KINDS.items()}
    seconds = {f"{name} {part}": [] for name in runs for part in ("step", "update")}
    for i in range(WARM + rounds):
        for name, (model, optimizer, updating) in runs.items():
            begin = time.perf_counter()
            model(torch.randn(ROWS, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            whole, update = time.perf_counter() - begin, updating.pop()
            if i >= WARM:
                seconds[f"{name} step"].append(whole - update)
                seconds[f"{name} update"].append(update)
    return seconds


def build(width, growth, density, weights):
    """Return a model, its optimizer, and a list that receives the seconds of each update."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width, bias=False) for _ in range(LAYERS)])
    optimizer, updating = torch.optim.AdamW(model.parameters(), lr=1e-4), []
    modes = dict(prune_mode="magnitude", growth_mode=growth, redistribution_mode="none", weights=weights)
    masking = Masking(optimizer, None, **modes, prune_every_k_steps=1)
    masking.add_module(model, density)
    move = masking.truncate_weights

    def timed():
        begin = time.perf_counter()
        move()
        updating.append(time.perf_counter() - begin)

    masking.truncate_weights = timed
    return model, optimizer, updating


if __name__ == "__main__":
    main()
