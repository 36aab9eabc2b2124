"""Photographs too many for memory: decoded in worker processes, normalised on the device.

Which images a step takes, and how each is cropped, depends on the seed, the epoch and the image alone: it is the
same on any number of processes and workers, and after a resume.
"""

import atexit
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparselearning.checkpoint import write_atomically
from sparselearning.experiments.datafiles import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1], per channel
PADDING = -1  # as an index: an image that is none; as a label: one that does not count


class Source(Protocol):
    """Encoded images and their classes."""

    classes: list[str]
    labels: np.ndarray  # int64 [N]

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        ...

    def name(self, index: int) -> str:
        """Return where the image is, for messages."""
        ...


class FolderSource:
    """Images in one folder per class: `folder`/<class>/<image>.

    Raises:
        DataError: if there is no such folder, or a class without images.
    """

    def __init__(self, folder: Path):
        from torchvision.datasets import ImageFolder

        try:
            found = ImageFolder(folder)
        except OSError as error:
            raise DataError(f"{folder} holds no images in one folder per class: {error}") from error
        self.folder = folder
        self.classes = found.classes
        self.labels = np.array([label for _, label in found.samples])
        # One array of bytes, for every worker process would copy a list of a million strings.
        self._names = np.array([os.path.relpath(path, folder).encode() for path, _ in found.samples])

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self.folder / self._names[index].decode())


class ShardSource:
    """Images in tar files of WebDataset's layout: members <key>.jpg and <key>.cls, the class's number, side by side.

    Read by position, not as a stream, so that shards are shuffled and divided like single files. Where the members
    are is found once, and kept beside each shard as <shard>.index.json if the folder can be written.

    Raises:
        DataError: if there are no such shards, or one holds no images.
    """

    def __init__(self, folder: Path, part: str):
        self.shards = sorted(folder.glob(f"*{part}*.tar"))
        if not self.shards:
            raise DataError(f"There are no shards *{part}*.tar in {folder}.")
        entries = [(i, *entry) for i, shard in enumerate(self.shards) for entry in _index(shard)]
        self._where = np.array(entries, dtype=np.int64)[:, :3]  # shard, offset, size
        self.labels = np.array(entries, dtype=np.int64)[:, 3]
        self.classes = [str(label) for label in range(self.labels.max() + 1)]
        self._mapped: dict[int, np.ndarray] = {}

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        shard, offset, size = self._where[index].tolist()
        if shard not in self._mapped:  # opened once, not for every image
            self._mapped[shard] = np.memmap(self.shards[shard], mode="r")
        return self._mapped[shard][offset : offset + size].tobytes()

    def __getstate__(self):
        return {**self.__dict__, "_mapped": {}}  # a worker that is not forked maps the shards itself

    def name(self, index: int) -> str:
        """Return the shard of the image, and its place in it."""
        shard, offset, _ = self._where[index].tolist()
        return f"{self.shards[shard]} at byte {offset}"


def _index(shard: Path) -> list[tuple[int, int, int]]:
    """Return offset, size and label of each image of a tar file."""
    kept = shard.with_name(f"{shard.name}.index.json")
    if kept.exists() and kept.stat().st_mtime >= shard.stat().st_mtime:
        return json.loads(kept.read_text())
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key = folder + slash + stem
                if extension.lower() in ("jpg", "jpeg", "png"):
                    images[key] = member.offset_data, member.size
                elif extension == "cls":
                    labels[key] = int(tar.extractfile(member).read())  # pyright: ignore[reportOptionalMemberAccess]
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{shard} is no shard of images <key>.jpg and classes <key>.cls: {error}") from error
    if not images or images.keys() != labels.keys():
        raise DataError(f"{shard} holds {len(images)} images <key>.jpg and {len(labels)} classes <key>.cls.")
    entries = [(*images[key], labels[key]) for key in images]
    if os.access(shard.parent, os.W_OK):
        write_atomically(kept, lambda file: file.write(json.dumps(entries).encode()))
    return entries


@dataclass
class Photographs(Dataset):
    """The images of a source as uint8 [3, size, size] with their labels, picked by (epoch, index).

    For training a random part of the image, 8% to 100% of its area, in half of the cases mirrored (Szegedy et al.
    2014, https://arxiv.org/abs/1409.4842); otherwise the middle seven eighths.
    """

    source: Source
    size: int
    train: bool
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, where: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = where
        if index == PADDING:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), PADDING
        try:
            image = self._decode(self.source.read(index), np.random.default_rng((self.seed, epoch, index)))
        except (OSError, RuntimeError, SyntaxError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{self.source.name(index)} cannot be read: {reason}") from None
        return image, int(self.source.labels[index])

    def _decode(self, encoded, random):
        from PIL import Image

        image = Image.open(io.BytesIO(encoded))  # reads the size alone
        if not self.train:
            return cut(image, middle(*image.size), self.size)
        part = cut(image, random_part(*image.size, random), self.size)
        return part.flip(2) if random.random() < 0.5 else part


Box = tuple[int, int, int, int]  # left, top, width, height


def random_part(width: int, height: int, random: np.random.Generator) -> Box:
    """Draw a part of an image: of 8% to 100% of its area and of a shape between 3:4 and 4:3, if that fits."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    return middle(width, height, share=1)


def middle(width: int, height: int, share: float = 7 / 8) -> Box:
    """Return the square in the middle of an image, of this share of its shorter side."""
    side = max(1, round(min(width, height) * share))
    return (width - side) // 2, (height - side) // 2, side, side


def cut(image: Any, box: Box, size: int) -> Tensor:
    """Return a part of a Pillow image that is not decoded yet, resized to uint8 [3, size, size].

    A JPEG that is to shrink by two or more is decoded at a half, a quarter or an eighth of its size.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    left, top, width, height = box
    shrink = min(width, height) // size
    if shrink < 2:  # torchvision resizes uint8 faster than Pillow
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return F.resized_crop(pixels, top, left, height, width, [size, size], antialias=True)
    full = image.size
    image.draft("RGB", (full[0] // shrink, full[1] // shrink))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    corners = (left * x, top * y, (left + width) * x, (top + height) * y)
    part = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=corners)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


@dataclass
class TrainingBatches:
    """Batches of (epoch, index) for one of `processes` processes, in the order of the epoch.

    A step takes `batch_size` images in all, in `accumulate` parts one after the other, each divided among the
    processes. Images that do not fill a step are left out, others in every epoch.
    """

    count: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    processes: int = 1
    seed: int = 0
    epoch: int = 1
    start: int = 0  # batches of the epoch that are done

    def __len__(self) -> int:
        return self.count // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        size = self.batch_size // self.accumulate
        for i in range(self.start, len(self)):
            mine = order[i * size : (i + 1) * size][self.rank :: self.processes]
            yield [(self.epoch, int(index)) for index in mine]


@dataclass
class EvaluationBatches:
    """Batches of (epoch, index) that show every image to one of the processes, once.

    All processes get batches of the same sizes; what is missing is filled with padding, which has label -1.
    """

    count: int
    batch_size: int
    rank: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = -(-self.count // self.processes)
        mine = [i if i < self.count else PADDING for i in range(self.rank, share * self.processes, self.processes)]
        for begin in range(0, share, self.batch_size):
            yield [(0, index) for index in mine[begin : begin + self.batch_size]]


def sources(location: str) -> tuple[Source, Source]:
    """Return the training and the validation images of a data set.

    `location` is a folder with train/<class>/<image> and val/<class>/<image>, or 'webdataset:' and a folder of
    shards *train*.tar and *val*.tar.

    Raises:
        DataError: if it is neither, or the parts have different classes.
    """
    kind, _, folder = location.rpartition(":")
    path = Path(folder).expanduser()
    if kind == "webdataset":
        train, valid = ShardSource(path, "train"), ShardSource(path, "val")
    elif (path := Path(location).expanduser()).is_dir():
        train, valid = FolderSource(path / "train"), FolderSource(path / "val")
    else:
        raise DataError(f"Expected a folder that holds train/ and val/, or webdataset:FOLDER, got {location}.")
    if train.classes != valid.classes:
        differing = sorted(set(train.classes) ^ set(valid.classes))
        raise DataError(f"{location} has other classes in train and val: {', '.join(differing[:5])} in one alone.")
    return train, valid


def load(images: Photographs, batches: Any, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of uint8 images [N, 3, size, size] and labels [N], in pinned memory for a GPU."""
    if workers:
        atexit.register(_end_workers)
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its draws would make a resumed run another one
        worker_init_fn=_leave_signals_to_the_trainer,
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore what asks the run to stop: it ends the workers after the running step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_workers() -> None:
    """End workers that an error left behind: they ignore SIGTERM, and Python would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for another error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _in_one_line(batches):
    """Yield the batches; a mistake in the data comes without the traceback that a worker process puts before it."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def on_device(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, channels_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised float32 images and labels on `device`.

    On a GPU the next batch is copied and normalised on a side stream while the last one is computed with.
    """
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=device)[:, None, None]

    def move(images, labels):
        images = images.to(device, non_blocking=True).to(torch.float32).mul_(scale).add_(shift)
        images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
        return images, labels.to(device, non_blocking=True)

    batches = _in_one_line(batches)
    if device.type != "cuda":
        for images, labels in batches:
            yield move(images, labels)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # for scale and shift
    ready = None
    for images, labels in batches:
        with torch.cuda.stream(stream):
            coming = move(images, labels)
        if ready is not None:
            yield ready
        now = torch.cuda.current_stream(device)
        now.wait_stream(stream)
        for tensor in coming:
            tensor.record_stream(now)
        ready = coming
    if ready is not None:
        yield ready
