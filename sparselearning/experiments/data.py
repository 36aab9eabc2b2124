"""Data sets that fit in memory.

Decoded once, kept as uint8 on the device, normalised and augmented there a batch at a time.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparselearning import distributed
from sparselearning.experiments.datafiles import Arrays, DataError, read_cifar, read_mnist


@dataclass
class Split:
    """Images, uint8 [N, C, H, W], and their classes, int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Data:
    """A data set: its parts, and what turns its bytes into network input."""

    train: Split
    valid: Split | None
    test: Split
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]
    augment: bool  # whether training images are to be cropped and flipped
    classes: int = 10

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load(
    name: str, folder: str | Path | None = None, device: torch.device | str = "cpu", valid_split: float = 0.1
) -> Data:
    """Return the data set `name`, one of SOURCES, with its bytes on `device`.

    The last `valid_split` of the training images are the validation set, the same in every run; with 0
    there is none. The files are looked for in `folder`, by default the environment variable
    SPARSELEARNING_DATA or else ./data, and downloaded there if absent; `digits` needs none.

    Raises:
        ValueError: if there is no such data set, or `valid_split` leaves nothing to train on.
        DataError: if a file is damaged, or is absent and cannot be downloaded.
    """
    if name not in SOURCES:
        raise ValueError(f"Unknown data set {name!r}. Choose from: {', '.join(SOURCES)}.")
    if not 0 <= valid_split < 1:
        raise ValueError(f"valid_split is the fraction of training images held out, in [0, 1); got {valid_split}.")
    folder = Path(folder or os.environ.get("SPARSELEARNING_DATA") or "data").expanduser()
    source = SOURCES[name]
    try:
        whole, test = (_split(*arrays, device) for arrays in source.read(folder))
    except OSError as error:
        raise DataError(f"The files of {name} in {folder} cannot be read: {error}.") from error
    held_out = max(1, round(len(whole) * valid_split)) if valid_split else 0
    if held_out == len(whole):
        raise ValueError(f"valid_split {valid_split} holds out all {len(whole)} training images. Take a smaller one.")
    cut = len(whole) - held_out
    train = Split(whole.images[:cut], whole.labels[:cut])
    valid = Split(whole.images[cut:], whole.labels[cut:]) if held_out else None
    return Data(train, valid, test, source.mean, source.std, source.augment)


def count_batches(split: Split, batch_size: int) -> int:
    """Return how many batches `batches` yields from the whole split; the last one may be smaller."""
    return -(-len(split) // batch_size)


def batches(
    split: Split,
    batch_size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    shuffle: bool = False,
    augment: bool = False,
    channels_last: bool = False,
    order: Tensor | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images, float32 [batch_size, C, H, W], and labels [batch_size], on the split's device.

    With `shuffle` the order is one permutation from torch's global generator. To resume in the middle of an
    epoch, draw `order = torch.randperm(len(split))` at its beginning, keep it, and pass it again with `start`,
    the number of batches done; with the generator's state restored the rest is bitwise the same.

    >>> split = Split(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4))
    >>> for images, labels in batches(split, 3, mean=[0.0], std=[1 / 255], order=torch.tensor([2, 0, 3, 1])):
    ...     print(images.flatten().tolist(), labels.tolist())
    [2.0, 0.0, 3.0] [2, 0, 3]
    [1.0] [1]
    """
    device = split.images.device
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None]
    if order is None and shuffle:
        order = torch.randperm(len(split))
    if order is not None:
        order = order.to(device)
    for begin in range(start * batch_size, len(split), batch_size):
        images, labels = _take(split, slice(begin, begin + batch_size), order)
        if augment:
            images = crop_and_flip(images, *draw_crops(len(images), device))
        images = images.to(torch.float32).mul_(scale).add_(shift)
        # Converted last: per-channel arithmetic is ten times slower in this layout.
        yield (images.contiguous(memory_format=torch.channels_last) if channels_last else images), labels


def share(batches: Iterable[tuple[Tensor, Tensor]], evenly: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of each batch; all of it where there is one process.

    With `evenly` all processes get as many, and the images that are left over (fewer than there are processes) go.
    The batches have to be the same on all processes, as they are after the same seed.
    """
    rank, processes = distributed.rank(), distributed.processes()
    for images, labels in batches:
        end = len(labels) // processes * processes if evenly else len(labels)
        if end:
            yield images[rank:end:processes], labels[rank:end:processes]


def draw_crops(count: int, device: torch.device, pad: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Draw for each image its crop's top and left corner in 0..2 pad, and whether it is mirrored."""
    top, left = torch.randint(0, 2 * pad + 1, (2, count), device=device)
    return top, left, torch.rand(count, device=device) < 0.5


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int = 4) -> Tensor:
    """Return crops of the size of `images` [N, C, H, W] out of their reflection-padded versions.

    Image i begins at row `top[i]` and column `left[i]` of its padded version, and is mirrored left to right
    where `flip[i]`. One gather moves the pixels of all images.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + top[:, None]
    columns = torch.arange(width, device=images.device) + left[:, None]
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    rows, columns = _reflect(rows - pad, height), _reflect(columns - pad, width)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    return images.flatten(2).gather(2, pixels[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror indices that left 0..size-1 back into it, without repeating the border."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _take(split: Split, part: slice, order: Tensor | None) -> tuple[Tensor, Tensor]:
    if order is None:
        return split.images[part], split.labels[part]
    return split.images.index_select(0, order[part]), split.labels.index_select(0, order[part])


def _split(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Split:
    return Split(torch.tensor(images, device=device), torch.tensor(labels, dtype=torch.int64, device=device))


def read_digits(folder: Path) -> tuple[Arrays, Arrays]:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 28x28, a fixed fifth as test set.

    The images are those of Alpaydin and Kaynak (1998), https://archive.ics.uci.edu/dataset/80. `folder` is
    not looked at.

    Raises:
        DataError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("The digits come with scikit-learn. Install it: pip install scikit-learn.") from error
    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear").round().byte().numpy()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    cut = len(labels) - len(labels) // 5
    train, test = order[:cut], order[cut:]
    return (images[train], labels[train]), (images[test], labels[test])


class Source(NamedTuple):
    """Where a data set comes from, and the statistics of its training pixels per channel."""

    read: Callable[[Path], tuple[Arrays, Arrays]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False


SOURCES = {
    "digits": Source(read_digits, (0.3049,), (0.3244,)),
    "mnist": Source(read_mnist, (0.1307,), (0.3081,)),
    "cifar": Source(read_cifar, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), augment=True),
}
