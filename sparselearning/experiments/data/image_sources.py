"""Where photographs come from: one folder per class, or the tar files of WebDataset."""

import json
import os
import tarfile
from pathlib import Path
from typing import Protocol

import numpy as np

from sparselearning.checkpoint import write_atomically
from sparselearning.experiments.data.files import DataError


class ImageSource(Protocol):
    """Encoded images and their labels."""

    classes: list[str]
    labels: np.ndarray  # int64 [N]

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        ...

    def name(self, index: int) -> str:
        """Return where the image is, for error messages."""
        ...


class FolderSource:
    """Images in one folder per class: `folder`/<class>/<image>.

    Raises:
        DataError: if there is no such folder, or a class has no images.
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
        # Every worker process would copy a list of a million strings; it shares one array of bytes.
        self._names = np.array([os.path.relpath(path, folder).encode() for path, _ in found.samples])

    def read(self, index: int) -> bytes:
        """Return the encoded image."""
        return Path(self.name(index)).read_bytes()

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self.folder / self._names[index].decode())


class ShardSource:
    """Images in tar files (shards) of WebDataset's layout: <key>.jpg, and beside it <key>.cls with the class number.

    An image is read by its position in the shard, so that images can be shuffled and divided like single files. The
    positions are found once and saved beside the shard as <shard>.index.json, if the folder is writable.

    Raises:
        DataError: if there are no shards, or a shard holds no images.
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
        return {**self.__dict__, "_mapped": {}}  # a worker process that was not forked maps the shards itself

    def name(self, index: int) -> str:
        """Return the shard of the image, and the image's position in it."""
        shard, offset, _ = self._where[index].tolist()
        return f"{self.shards[shard]} at byte {offset}"


def _index(shard: Path) -> list[tuple[int, int, int]]:
    """Return offset, size and label of each image in a tar file."""
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
        raise DataError(f"{shard} is not a tar file of images <key>.jpg and classes <key>.cls: {error}") from error
    if not images or images.keys() != labels.keys():
        raise DataError(
            f"{shard} holds {len(images)} images <key>.jpg and {len(labels)} classes <key>.cls. Expected one of each "
            "for every key."
        )
    entries = [(*images[key], labels[key]) for key in images]
    if os.access(shard.parent, os.W_OK):
        write_atomically(kept, lambda file: file.write(json.dumps(entries).encode()))
    return entries
