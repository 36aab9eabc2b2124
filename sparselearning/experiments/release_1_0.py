"""What the script of release 1.0 imports from sparselearning.utils: loaders, and the features of classes."""

import argparse
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.experiments.data import in_memory
from sparselearning.experiments.report import features

logger = logging.getLogger(__name__)


class Loader:
    """The batches of a split, shuffled anew in each pass where that is asked for; it has the length of a DataLoader."""

    def __init__(self, split: in_memory.Split, batch_size: int, **settings: Any):
        self.length = in_memory.count_batches(split, batch_size)
        self.batches = partial(in_memory.batches, split, batch_size, **settings)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches()


Loaders = tuple[Loader, Loader | None, Loader]  # training, validation, test


def get_mnist_dataloaders(args: argparse.Namespace, validation_split: float = 0.0) -> Loaders:
    """Return loaders of MNIST, from $SPARSELEARNING_DATA or from ../data, where release 1.0 kept it.

    `args` has `batch_size` and `test_batch_size`.
    """
    return _loaders("mnist", "../data", args, validation_split)


def get_cifar10_dataloaders(args: argparse.Namespace, validation_split: float = 0.0, max_threads: int = 10) -> Loaders:
    """Return loaders of CIFAR-10, from $SPARSELEARNING_DATA or from ./_dataset, where release 1.0 kept it.

    The images are in memory, and no threads load them: `max_threads` means nothing any more.
    """
    return _loaders("cifar", "_dataset", args, validation_split)


def _loaders(name, folder, args, validation_split):
    data = in_memory.load(name, os.environ.get("SPARSELEARNING_DATA") or folder, valid_split=validation_split)
    look = dict(mean=data.mean, std=data.std)
    valid = None if data.valid is None else Loader(data.valid, args.test_batch_size, **look)
    train = Loader(data.train, args.batch_size, shuffle=True, augment=data.augment, **look)
    return train, valid, Loader(data.test, args.test_batch_size, **look)


def plot_class_feature_histograms(
    args: argparse.Namespace, model: nn.Module, device: torch.device, test_loader: Loader, optimizer: Any
) -> None:
    """Write the class specialisation of each convolution's channels to ./results, under release 1.0's names.

    `mnist_cifar/main.py --save-features` and plot_feature_histograms.py draw it.
    """
    kind = "dense" if args.dense else "sparse"
    try:
        seen = features.collect(model, test_loader, 10)
    except ValueError as error:  # a network without convolutions
        logger.warning("%s", error)
        return
    Path("results").mkdir(exist_ok=True)
    for i, counts in enumerate(seen.values()):
        np.save(f"results/alexnet_{kind}_feat_data_layer_{i}", features.specialisation(counts).numpy())
