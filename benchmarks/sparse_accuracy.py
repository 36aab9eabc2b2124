"""Test error and time of LeNet-5 on MNIST, trained with masks and on sparse kernels.

    python benchmarks/sparse_accuracy.py --data DIR
    python benchmarks/sparse_accuracy.py --data DIR --quick

Compares exact sparse momentum (weights="zero": dense kernels, dense momentum) with weights="sparse", with the same
seeds and settings: SGD with momentum 0.9 and cosine learning rate from 0.1, weight decay 5e-4, batch 100, density 0.05.
The test set is read once per run, at the end. Printed last: mean test error +- standard error, and seconds of training.
"""

import logging
import statistics
import time

import common
import torch
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking
from sparselearning.experiments.data.in_memory import batches, load
from sparselearning.models import build


def main():
    """Train, log and save."""
    more = dict(
        data=("", "folder of the data set"),
        epochs=(10, "epochs of training"),
        seeds=(3, "runs of each kind"),
        density=(0.05, "of the weights"),
    )
    args = common.parse(__doc__, rounds=1, **more)
    if args.quick:
        args.epochs, args.seeds = 1, 1
    data = load("mnist", args.data or None)
    rows = []
    for seed in range(args.seeds):
        for weights in ("zero", "sparse"):
            rows.append(run(args, data, weights, seed))
            logging.info("%s", rows[-1])
    common.save(args, "sparse_accuracy", rows)
    for backend in ("masked", "sparse"):
        chosen = [row for row in rows if row["backend"] == backend]
        errors, seconds = ([row[key] for row in chosen] for key in ("test_error", "seconds"))
        deviation = statistics.stdev(errors) if len(errors) > 1 else float("nan")
        spread = deviation / len(errors) ** 0.5
        logging.info(
            "%s: test error %.4f +- %.4f, %.0f seconds",
            backend,
            statistics.mean(errors),
            spread,
            statistics.mean(seconds),
        )


def run(args, data, weights, seed):
    """Return the test error and the seconds of training of one run."""
    torch.manual_seed(seed)
    model = build("lenet5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = args.epochs * (len(data.train) // 100)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    masking = Masking(optimizer, CosineDecay(0.5, steps), weights=weights)
    masking.add_module(model, args.density)
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
    return dict(backend="sparse" if weights == "sparse" else "masked", seed=seed, test_error=error, seconds=seconds)


if __name__ == "__main__":
    main()
