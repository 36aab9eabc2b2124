"""The first steps of regrown weights, by what the optimizer's state of them starts from.

    python benchmarks/regrown_steps.py

trains LeNet-300-100 on MNIST with 5% of its weights, RigL and AdamW, and prints a row for each start: the mean of
|step| / learning rate over the regrown weights, 1 to 10 steps after an update. The first 1,000 training steps do not
count, while Adam's bias correction acts on all weights.
"""

import argparse
import statistics

import torch
from torch.nn.functional import cross_entropy

from sparselearning import Masking, models
from sparselearning.experiments.data import in_memory

STARTS = {
    "as it is": dict(reset_state=False),
    "zero": dict(reset_state=True),
    "mean": dict(reset_state="mean"),
    "restart": dict(reset_state="restart"),
    "restart, warm-up of 100 steps": dict(reset_state="restart", regrown_warm_up=100),
}
EVERY, FIRST, COUNTED = 100, 1000, 10


def main():
    """Train once for each start and seed, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="epochs to train (default: 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19], help="(default: 17 18 19)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--data-dir", help="folder of the data files (default: $SPARSELEARNING_DATA or ./data)")
    args = parser.parse_args()
    data = in_memory.load("mnist", args.data_dir)
    for name, start in STARTS.items():
        sizes = [sizes_of_steps(data, start, seed, args) for seed in args.seeds]
        row = [statistics.fmean(at for run in sizes for at in run[i]) for i in range(COUNTED)]
        print(f"| {name} | {' | '.join(f'{size:.2f}' for size in row)} |", flush=True)


def sizes_of_steps(data, start, seed, args):
    """Return by the number of steps after an update, from 1, one mean for each update."""
    torch.manual_seed(seed)
    model = models.build("lenet300-100")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    total = args.epochs * in_memory.count_batches(data.train, 100)
    masking = Masking.from_method("rigl", model, optimizer, total, 0.05, prune_every_k_steps=EVERY, **start)
    sizes, grown, before = [[] for _ in range(COUNTED)], [], {}
    for _ in range(args.epochs):
        for images, labels in in_memory.batches(data.train, 100, mean=data.mean, std=data.std, shuffle=True):
            after = masking.steps % EVERY  # steps since the last update
            if masking.steps >= FIRST and after == 0:
                grown = [layer.mask & ~before[layer.name] for layer in masking.layers]
            old = [layer.weight.detach().clone() for layer in masking.layers]
            before = {layer.name: layer.mask.clone() for layer in masking.layers}
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            if after < COUNTED and any(mask.any() for mask in grown):
                taken = [layer.weight.detach() - was for layer, was in zip(masking.layers, old, strict=True)]
                steps = torch.cat([step[mask] for step, mask in zip(taken, grown, strict=True)])
                sizes[after].append(steps.abs().mean().item() / args.lr)
    return sizes


if __name__ == "__main__":
    main()
