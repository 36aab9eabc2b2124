"""Where photographs come from: one folder per class, or the tar files of WebDataset.

What looks at a data set calls `found` with each fault that it finds, a line that begins with a path. The default raises
a `DataError` with the first; a list's `append` collects them all.
"""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from sparselearning.experiments.data.files import DataError, printable, reason, refuse
from sparselearning.experiments.data.shard_index import index, stamp
from sparselearning.experiments.data.shards import Entry, scan

Found = Callable[[str], object]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
WORDS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}  # in the names of shards
MOST_OPEN = 256  # shards that a process holds open: 1,024 files is a usual limit

logger = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Encoded images and their labels."""

    classes: list[str]
    labels: np.ndarray  # int64 [N]

    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            OSError, DataError: if it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Return where the image is, for error messages: one line that can be printed."""
        ...


class FolderSource:
    """Images in one folder per class: `folder`/<class>/<image>, in the order of torchvision's ImageFolder.

    Images may lie deeper, and be links. What is named like an image and is a folder counts as an image that cannot be
    read. Files of other names are left out, and the log names the first.

    Raises:
        DataError: if there is no such folder, it cannot be listed, or a class has no images; it names all that have
            none.
    """

    def __init__(self, folder: Path, found: Found = refuse):
        self.folder = folder
        others: list[str] = []
        self.classes = _classes_in(folder, found, others)
        paths = [[*_images_in(folder / name, found, others)] for name in self.classes]
        if empty := [name for name, images in zip(self.classes, paths, strict=True) if not images]:
            found(
                f"{printable(folder)} holds no images in {len(empty)} of {len(self.classes)} classes: "
                f"{shorten(empty)}. Expected <class>/<image> with a name that ends in {', '.join(EXTENSIONS)}."
            )
        if others:
            text = "%d files in %s are not read: %s. Expected <class>/<image> with a name that ends in %s."
            logger.warning(text, len(others), printable(folder), shorten(others, 3), ", ".join(EXTENSIONS))
        self.labels = np.repeat(np.arange(len(paths)), np.array([len(images) for images in paths], int))
        # Every worker process would copy a list of a million strings; it shares one array of bytes.
        self._names = np.array([os.fsencode(os.path.relpath(path, folder)) for images in paths for path in images])

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        path = self._path(index)
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise DataError("it is a folder")
        if not stat.S_ISREG(kind):  # to open a pipe would wait for ever
            raise DataError("it is no regular file")
        return path.read_bytes()

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return printable(self._path(index))

    def _path(self, index):
        return self.folder / os.fsdecode(bytes(self._names[index]))


def _classes_in(folder: Path, found: Found, others: list[str]) -> list[str]:
    """Return the names of the folders in a folder, and collect the paths of its files."""
    try:
        with os.scandir(folder) as scanned:
            entries = [*scanned]
    except OSError as error:
        found(f"{printable(folder)} holds no images in one folder per class: {reason(error)}.")
        return []
    others += sorted(entry.path for entry in entries if not entry.is_dir() and not entry.name.startswith("."))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        found(f"{printable(folder)} holds no images in one folder per class: it holds no folders.")
    return classes


def _images_in(folder: Path, found: Found, others: list[str]) -> Iterator[str]:
    """Yield the paths of the images in a folder and below it, folder by folder, and collect those of other files."""

    def unlisted(error):
        found(f"{printable(error.filename)} cannot be listed: {reason(error)}.")

    walked = []
    for place, folders, files in os.walk(folder, followlinks=True, onerror=unlisted):
        here = Path(place).resolve()
        for name in folders:
            path = os.path.join(place, name)
            if os.path.islink(path) and Path(path).resolve() in (here, *here.parents):
                found(f"{printable(path)} is a link to a folder that contains it: its images would be read many times.")
                return
        walked.append((place, sorted(filter(_is_image, (*folders, *files)))))
        others += [os.path.join(place, name) for name in files if not _is_image(name) and not name.startswith(".")]
        folders[:] = [name for name in folders if not _is_image(name)]
    for place, names in sorted(walked):
        yield from (os.path.join(place, name) for name in names)


def _is_image(name):
    return name.lower().endswith(EXTENSIONS)


def shorten(names: list[str], most: int = 10) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


class ShardSource:
    """Images in the tar files (shards) of a part, "train" or "val", in WebDataset's layout (see `shards.py`).

    An image is read by its position in the shard, so that images can be shuffled and divided like single files. The
    positions are found once and kept beside the shard (see `shard_index.py`). With `indexed=False` nothing is kept.

    Raises:
        DataError: if there are no shards, or one has a fault.
    """

    def __init__(self, folder: Path, part: str, found: Found = refuse, indexed: bool = True):
        self.shards = shards_of(folder, part, found)
        self._stamps = []
        entries: list[tuple[int, Entry]] = []
        for i, shard in enumerate(self.shards):
            self._stamps.append(_stamp(shard))
            entries += [(i, entry) for entry in (index(shard) if indexed else _scan(shard, found))]
        where = [(i, entry.offset, entry.size) for i, entry in entries]
        self._where = np.array(where, dtype=np.int64).reshape(-1, 3)
        self._names = np.array([entry.name.encode(errors="surrogateescape") for _, entry in entries])
        self.labels = np.array([entry.label for _, entry in entries], dtype=np.int64)
        self.classes = [str(label) for label in range(self.labels.max(initial=-1) + 1)]
        self._open: dict[int, int] = {}  # descriptors by shard, the longest unused first

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        shard, offset, size = self._where[index].tolist()
        opened = self._open.pop(shard, None)
        if opened is None:
            if len(self._open) >= MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            opened = os.open(self.shards[shard], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open[shard] = opened
        content = _read_at(opened, size, offset)
        if len(content) != size or stamp(opened) != self._stamps[shard]:
            raise DataError("the shard has changed since the run began; start the run again")
        return content

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}  # a worker process that was not forked opens the shards itself

    def __del__(self):
        for opened in self.__dict__.get("_open", {}).values():
            os.close(opened)

    def name(self, index: int) -> str:
        """Return the shard of the image, and the image's name in it."""
        shard = self._where[index, 0]
        return f"{printable(self.shards[shard])}: {printable(bytes(self._names[index]))}"


def _read_at(opened, size, offset):
    if hasattr(os, "pread"):  # workers that were forked share the position in an open file
        return os.pread(opened, size, offset)
    os.lseek(opened, offset, os.SEEK_SET)
    return os.read(opened, size)


def _stamp(shard):
    try:
        return stamp(shard)
    except OSError:
        return None  # `index` and `scan` say why


def _scan(shard, found):
    result = scan(shard)
    for fault in result.faults:
        found(fault)
    return result.entries


def shards_of(folder: Path, part: str, found: Found = refuse) -> list[Path]:
    """Return the tar files in a folder that belong to a part: a word of their name says so.

    Words are runs of letters, so that imagenet-train-000.tar and val_01.tar belong to a part, and constrained-000.tar
    and trainval.tar to none; the log names the latter.
    """
    try:
        tars = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    except OSError as error:
        found(f"{printable(folder)} cannot be listed: {reason(error)}.")
        return []
    parts = {path: parts_of(path.name) for path in tars}
    for path in tars:
        if len(parts[path]) > 1:
            found(f"{printable(path)} is named as a shard of {' and of '.join(parts[path])}. Expected one of them.")
    if not (shards := [path for path in tars if parts[path] == [part]]):
        there = (
            f"The tar files there are {shorten([path.name for path in tars], 5)}." if tars else "It has no tar files."
        )
        words = f"a name with the word {part}, as in {part}-000.tar"
        found(f"There are no shards *{part}*.tar in {printable(folder)}. Expected {words}. {there}")
    others = [path.name for path in tars if not parts[path]]
    if others and part == "train":  # once for both parts
        text = "%d tar files in %s are named neither as shards of train nor of val, and are not read: %s"
        logger.warning(text, len(others), printable(folder), shorten(others, 5))
    return shards


def parts_of(name: str) -> list[str]:
    """Return the parts that the words of a shard's name say.

    >>> parts_of("imagenet-train-000.tar"), parts_of("constrained-000.tar")
    (['train'], [])
    """
    words = set(re.findall(r"[^\W\d_]+", name.lower().removesuffix(".tar")))
    return [part for part, meant in WORDS.items() if words & meant]
