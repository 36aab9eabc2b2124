"""Test error and time on MNIST of training with masks, on active weights, and on active weights with few candidates.

    python benchmarks/sparse_accuracy.py --data DIR
    python benchmarks/sparse_accuracy.py --data DIR --quick

Compares exact sparse momentum (weights="zero": dense kernels, dense momentum) with weights="sparse": with the mean
gradient of all inactive weights ("sparse, all"), and with that of as many candidates as there are active weights
("sparse, candidates"; small layers average all by default). Same seeds and settings: SGD with momentum 0.9 and cosine
learning rate from 0.1, weight decay 5e-4, batch 100, density 0.05. Networks: LeNet-300-100, LeNet-5, and four
convolutions ("convolutions"). The test set is read once per run, at the end. Printed last: mean test error +- standard
error, and seconds of training.
"""

import logging
import statistics
import time

import common
import torch
from torch import nn
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking
from sparselearning.experiments.data.in_memory import batches, load
from sparselearning.models import build
from sparselearning.sparse.training import SparseTraining

KINDS = {
    "masked": lambda: "zero",
    "sparse, all": lambda: SparseTraining(candidates=2**62),
    "sparse, candidates": lambda: SparseTraining(candidates=1),
}


def convolutions():
    """Return four convolutions and a linear layer for images of 28 x 28, 112,464 weights."""
    sizes = [1, 32, 32, 64, 64]
    layers = []
    for i in range(4):
        layers += [nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False), nn.BatchNorm2d(sizes[i + 1]), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 10), nn.LogSoftmax(1))


NETWORKS = {"lenet300-100": None, "lenet5": None, "convolutions": convolutions}


def main():
    """Train, log and save."""
    more = dict(
        data=("", "folder of the data set"),
        epochs=(10, "epochs of training"),
        seeds=(3, "runs of each kind"),
        density=(0.05, "of the weights"),
        networks=(",".join(NETWORKS), "names, separated by commas"),
        kinds=("; ".join(KINDS), "names, separated by semicolons"),
    )
    args = common.parse(__doc__, rounds=1, **more)
    if args.quick:
        args.epochs, args.seeds = 1, 1
    data = load("mnist", args.data or None)
    rows, kinds = [], args.kinds.split("; ")
    for network in args.networks.split(","):
        for seed in range(args.seeds):
            for kind in kinds:
                rows.append(run(args, data, network, kind, seed))
                logging.info("%s", rows[-1])
                common.save(args, "sparse_accuracy", rows)
    for network in args.networks.split(","):
        for kind in kinds:
            chosen = [row for row in rows if (row["network"], row["kind"]) == (network, kind)]
            errors, seconds = ([row[key] for row in chosen] for key in ("test_error", "seconds"))
            deviation = statistics.stdev(errors) if len(errors) > 1 else float("nan")
            logging.info(
                "%s, %s: test error %.4f +- %.4f, %.0f seconds",
                network,
                kind,
                statistics.mean(errors),
                deviation / len(errors) ** 0.5,
                statistics.mean(seconds),
            )


def run(args, data, network, kind, seed):
    """Return the test error and the seconds of training of one run."""
    torch.manual_seed(seed)
    make = NETWORKS[network]
    model = build(network) if make is None else make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = args.epochs * (len(data.train) // 100)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    masking = Masking(optimizer, CosineDecay(0.5, steps), weights=KINDS[kind]())
    masking.add_module(model, args.density)
    masking.held.expect(len(data.train) // 100)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        for images, labels in batches(data.train, 100, mean=data.mean, std=data.std, shuffle=True):
            optimizer.zero_grad()
            F.nll_loss(model(images), labels).backward()
            masking.step()
            scheduler.step()
        if epoch < args.epochs - 1:
            masking.at_end_of_epoch()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        test = batches(data.test, 100, mean=data.mean, std=data.std)
        error = sum((model(x).argmax(1) != y).sum().item() for x, y in test) / len(data.test)
    return dict(network=network, kind=kind, seed=seed, test_error=error, seconds=seconds)


if __name__ == "__main__":
    main()
