"""Random MNIST and CIFAR-10 files in their standard formats, and comparison of what was read."""

import gzip
import pickle
import struct

import numpy as np
import torch

from sparselearning.experiments.data.files import CIFAR_FILES, MNIST_FILES


def write_idx(path, array):
    """Write `array` as an IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(place, suffix="", train=30, test=10):
    """Write random MNIST files and return their arrays by name."""
    random = np.random.default_rng(0)
    arrays = {}
    for name in MNIST_FILES:
        count = train if name.startswith("train") else test
        images = "images" in name
        arrays[name] = random.integers(0, 256 if images else 10, (count, 28, 28) if images else count)
        write_idx(place / (name + suffix), arrays[name])
    return arrays


def cifar_arrays(count=4):
    random = np.random.default_rng(0)
    shape = (len(CIFAR_FILES), count)
    return random.integers(0, 256, (*shape, 3072), dtype=np.uint8), random.integers(0, 10, shape, dtype=np.uint8)


def write_cifar_records(folder, count=4):
    pixels, labels = cifar_arrays(count)
    place = folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    for name, batch, classes in zip(CIFAR_FILES, pixels, labels, strict=True):
        (place / f"{name}.bin").write_bytes(np.hstack([classes[:, None], batch]).tobytes())
    return pixels, labels


def write_cifar_pickles(folder, count=4):
    pixels, labels = cifar_arrays(count)
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name, batch, classes in zip(CIFAR_FILES, pixels, labels, strict=True):
        content = {
            "batch_label": name,
            "labels": classes.tolist(),
            "data": batch,
            "filenames": ["a.png"] * count,
        }
        (place / name).write_bytes(pickle.dumps(content, protocol=4))
    return pixels, labels


def same_split(first, second):
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
