"""One epoch of main.py's loop, dense and sparse, compared with a minimal loop for the same network.

    python benchmarks/loop.py
    python benchmarks/loop.py --quick

The minimal loop is what one would write by hand for a single network: images normalised once and kept as floats, a
permutation, forward, backward, a fused step; no report, no schedule, no augmentation (main.py augments CIFAR-10).
Images are random, of the size of MNIST and CIFAR-10. An epoch has no evaluation and no checkpoint. A sparse epoch of
MNIST ends with an update of the masks; for CIFAR-10 only a part of an epoch is measured.
"""

import logging

import common
import torch
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking
from sparselearning.experiments.data import in_memory as datasets
from sparselearning.experiments.run.precision import Precision
from sparselearning.experiments.run.training import train_epoch

DENSITY = 0.05
BATCH = 100
# Shape of an image, mean and standard deviation of pixels; {model: (images per epoch, data set)}. MNIST trains on
# 54,000.
MNIST = ((1, 28, 28), (0.1307,), (0.3081,))
CIFAR = ((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGES = {"lenet300-100": (54_000, MNIST), "lenet5": (54_000, MNIST), "vgg-d": (1_000, CIFAR), "wrn-16-8": (300, CIFAR)}


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=7)
    names = ["lenet300-100"] if args.quick else list(IMAGES)
    common.save(args, "loop", [measure(args, name) for name in names])


def measure(args, name):
    """Return a row: the time of an epoch of one network in each of the three loops."""
    count, (shape, mean, std) = IMAGES[name]
    count = count // 20 if args.quick else count
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, device=args.device)
    split = datasets.Split(images, torch.randint(10, (count,), device=args.device))
    look = dict(mean=mean, std=std, channels_last=True, augment=shape[0] == 3)
    precision = Precision("bf16" if args.device.startswith("cuda") else "none", torch.device(args.device))

    def epoch_of_main(sparse):
        model = common.build(name, args.device).to(memory_format=torch.channels_last)
        optimizer = sgd(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 25_000, gamma=0.1)
        stepper = optimizer
        if sparse:
            stepper = Masking(optimizer, CosineDecay(0.5, 10_000))
            stepper.add_module(model, DENSITY)

        def run():
            batches = datasets.batches(split, BATCH, shuffle=True, **look)
            train_epoch(model, batches, stepper, scheduler, precision)
            if sparse and shape == MNIST[0]:
                stepper.at_end_of_epoch()

        return run

    kinds = {
        "minimal loop, dense": minimal_epoch(name, split, mean, std, precision),
        "main.py, dense": epoch_of_main(sparse=False),
        "main.py, sparse": epoch_of_main(sparse=True),
    }
    seconds = common.alternate(kinds, args.rounds, device=args.device)
    common.show(name, seconds)
    row = {
        "model": name,
        "images": count,
        "batch": BATCH,
        "density": DENSITY,
        "seconds": {kind: common.summary(values) for kind, values in seconds.items()},
        "images per second": {kind: count / common.summary(values)["median"] for kind, values in seconds.items()},
        "main.py dense / minimal": common.ratio(seconds["main.py, dense"], seconds["minimal loop, dense"]),
        "main.py sparse / minimal": common.ratio(seconds["main.py, sparse"], seconds["minimal loop, dense"]),
        "main.py sparse / dense": common.ratio(seconds["main.py, sparse"], seconds["main.py, dense"]),
    }
    for kind, rate in row["images per second"].items():
        logging.info("%-32s %-28s %9.0f images/s", name, kind, rate)
    common.log_ratios(name, row)
    return row


def sgd(model):
    """Return the optimizer of main.py."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def minimal_epoch(name, split, mean, std, precision):
    """Return an epoch of a loop written for one network."""
    model = common.build(name, split.images.device)
    optimizer = sgd(model)
    mean, std = (torch.tensor(values, device=split.images.device).view(-1, 1, 1) for values in (mean, std))
    images, labels = (split.images / 255 - mean) / std, split.labels

    def run():
        model.train()
        for part in torch.randperm(len(labels), device=labels.device).split(BATCH):
            optimizer.zero_grad()
            with precision.autocast():
                loss = F.nll_loss(model(images[part]).float(), labels[part])
            loss.backward()
            optimizer.step()

    return run


if __name__ == "__main__":
    main()
