"""Whole sparse networks: inference after `sparselearning.sparse.convert`, and training on the sparse kernels.

    python benchmarks/sparse_models.py
    python benchmarks/sparse_models.py --quick

Inference: time of the dense model (the faster of contiguous and channels_last, float32) and of the converted one.
Training: time of a step of masked training (weights="zero", dense kernels) and of weights="sparse". Weights are random,
at the given density. The kinds take turns; a ratio is the median over rounds, printed last.
"""

import copy
import logging

import common
import torch
from torch import nn
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking
from sparselearning.models import build
from sparselearning.sparse import convert

MODELS = ["vgg-d", "wrn-16-8"]


def main():
    """Measure, log and save."""
    more = dict(density=(0.05, "of the weights"), images=(32, "images per step of training"))
    args = common.parse(__doc__, rounds=11, **more)
    threads = [args.threads] if args.quick or args.threads == 1 else [1, args.threads]
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for name in MODELS[: 1 if args.quick else None]:
            for batch in (32, 1):
                rows.append(measure_inference(args, name, batch) | dict(threads=count))
            rows.append(measure_training(args, name) | dict(threads=count))
    common.save(args, "sparse_models", rows)
    for row in rows:
        label = f"{row['model']} {row['what']} batch {row['batch']}"
        logging.info("%-32s %d threads: %.2fx", label, row["threads"], row["ratio"])


def masked(name, density, weights="zero"):
    """Return a model, its optimizer and a Masking of it."""
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    masking = Masking(optimizer, CosineDecay(0.5, 10_000), weights=weights)
    masking.add_module(model, density, rescale=True)
    return model, optimizer, masking


def measure_inference(args, name, batch):
    """Return a row: the times, their ratio and the largest difference of outputs."""
    model = masked(name, args.density)[0]
    images = torch.randn(batch, 3, 32, 32)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # plain averages: after three passes, running ones would still shrink the signal
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 32, 32))
    model.eval()
    converted, report = convert(model, images)
    logging.info("%s, batch %d\n%s", name, batch, report)
    turned, turned_images = copy.deepcopy(model), images.to(memory_format=torch.channels_last)
    turned = turned.to(memory_format=torch.channels_last)
    with torch.no_grad():
        kinds = {
            "contiguous": lambda: model(images),
            "channels_last": lambda: turned(turned_images),
            "converted": lambda: converted(images),
        }
        seconds = common.alternate(kinds, args.rounds, least=0.05)
        difference = (model(images) - converted(images)).abs().max().item()
    common.show(f"{name} batch {batch}", seconds)
    dense = [min(pair) for pair in zip(seconds["contiguous"], seconds["channels_last"], strict=True)]
    row = {f"{kind}_ms": 1e3 * common.summary(values)["median"] for kind, values in seconds.items()}
    row |= dict(model=name, what="inference", batch=batch, largest_difference=difference)
    return row | dict(ratio=common.ratio(dense, seconds["converted"]))


def measure_training(args, name):
    """Return a row: the times of a step of masked and of sparse training, and their ratio."""
    images, labels = torch.randn(args.images, 3, 32, 32), torch.randint(10, (args.images,))

    def step_of(weights):
        model, optimizer, masking = masked(name, args.density, weights)

        def step():
            optimizer.zero_grad()
            F.nll_loss(model(images), labels).backward()
            masking.step()

        return step

    seconds = common.alternate({"masked": step_of("zero"), "sparse": step_of("sparse")}, args.rounds)
    common.show(f"{name} training batch {args.images}", seconds)
    row = {f"{kind}_ms": 1e3 * common.summary(values)["median"] for kind, values in seconds.items()}
    row |= dict(model=name, what="training", batch=args.images)
    return row | dict(ratio=common.ratio(seconds["masked"], seconds["sparse"]))


if __name__ == "__main__":
    main()
