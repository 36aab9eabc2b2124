"""Tar files (shards) in the layout of WebDataset: which images they hold, where, and of which class.

The rules are those of the WebDataset library (https://github.com/webdataset/webdataset, `tariterators.py`):

- A name is split at the first dot of its last part: `dogs/0001.seg.jpg` is the field `seg.jpg` of the key `dogs/0001`.
  Upper and lower case of a field are one.
- Members without a dot or with a first dot at the beginning, and those whose name begins with `__name__`, are no part
  of a sample.

Here a sample needs an image and a class. The image is the field `jpg`, `png`, `webp` or alike; failing that, a field
such as `img.jpg`, which must have the same name in the whole shard. The class is a whole number in the field `cls`,
or in `json`: a number, or an object with a number under "cls" or "label". Hard and symbolic links to members of the
shard count as what they name. The library skips links; as GNU tar writes them for equal files, we do not.
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparselearning.experiments.data.files import printable, reason

CLASSES = ("cls", "json", "jsn")
IMAGES = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "pbm", "pnm", "tif", "tiff", "webp", "gif")
MOST_CLASSES = 1_000_000  # a larger number is no class: the output layer would have so many rows
LONGEST_CHAIN = 10  # of links to links
LONGEST_LABEL = 2**20  # bytes of a member that holds a class
BLOCK = tarfile.BLOCKSIZE

_META = re.compile(r"__[^/]*__($|/)")
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_DOTS = "A name is split at its first dot, as WebDataset does: expected keys without dots"

Sample = dict[str, tarfile.TarInfo]  # the member of each field


class Entry(NamedTuple):
    """An image in a shard: where its bytes are, its class, and its name."""

    offset: int
    size: int
    label: int
    name: str
    stem: str = ""  # the image's field without its last part: "img" of img.jpg


@dataclass
class Scan:
    """What a shard holds: its sound images in its order, and a line for each fault."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    images: int = 0  # keys that have one
    classes: int = 0


def scan(shard: Path) -> Scan:
    """Read through a tar file; no fault raises, each is a line that begins with the path of the shard."""
    found = Scan()
    try:
        with shard.open("rb") as file:
            for key, sample in _samples(file, found.faults).items():
                try:
                    found.entries += _entries(file, key, sample, found)
                except ValueError as error:
                    found.faults.append(f"key {printable(key)} {error}.")
    except OSError as error:
        found.faults.append(f"it cannot be read: {reason(error)}.")
    if not found.entries and not found.faults:
        found.faults.append("it holds no images <key>.jpg with classes <key>.cls.")
    names = {entry.stem: printable(entry.name) for entry in reversed(found.entries)}
    if len(names) > 1:
        found.faults.append(f"the images are in different fields, as in {' and '.join(names.values())}. {_DOTS}.")
    found.faults = [f"{printable(shard)}: {fault}" for fault in found.faults]
    return found


def _samples(file: Any, faults: list[str]) -> dict[str, Sample]:
    """Return the members of each key by field, with what a link names in the place of the link."""
    members = list(_members(file, faults))
    by_name = {posixpath.normpath(member.name): member for member in members}
    samples: dict[str, Sample] = {}
    for member in members:
        if (split := split_name(member.name)) is None:
            continue
        key, field = split
        content = _linked(member, by_name)
        if content is None and field.rpartition(".")[2] in (*IMAGES, *CLASSES):
            faults.append(
                f"{printable(member.name)} is a link to {printable(member.linkname)}, which is not in the shard."
            )
        if content is None or not content.isreg():
            continue
        sample = samples.setdefault(key, {})
        if field in sample:
            faults.append(f"key {printable(key)} has the field {printable(field)} twice. {_DOTS}, and each key once.")
        sample[field] = content
    return samples


def _members(file: Any, faults: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file as far as it is sound, and check that it ends as a tar file does."""
    size = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or (member.isreg() and member.offset_data + member.size > size):
                    raise tarfile.ReadError(f"{printable(member.name)} does not end within it")
                yield member
            end = tar.offset
    except Exception as error:  # a damaged header can raise anything
        faults.append(
            f"it is not a whole tar file: {reason(error)}. Expected an uncompressed one; write or copy it anew."
        )
        return
    if fault := _fault_at_end(file, end):
        faults.append(f"it is not a whole tar file: {fault}. Write or copy it anew.")


def _fault_at_end(file: Any, end: int) -> str | None:
    """Return what is wrong behind the last member: a tar file ends with blocks of zeros, and tarfile does not check."""
    file.seek(end)
    first = file.read(BLOCK)
    if any(first):
        return f"byte {end:,} is no header of a member"
    if len(first) < BLOCK:
        return f"it was cut at byte {end:,}, for its end mark is missing"
    while chunk := file.read(2**20):
        if any(chunk):
            return f"it goes on behind its end mark at byte {end:,}, where no reader looks"
    return None


def _linked(member: tarfile.TarInfo, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the member that a link names, the member itself if it is no link, or None if there is none."""
    for _ in range(LONGEST_CHAIN):
        if not member.issym() and not member.islnk():
            return member
        folder = posixpath.dirname(member.name) if member.issym() else ""  # a hard link is named from the top
        if (found := members.get(posixpath.normpath(posixpath.join(folder, member.linkname)))) is None:
            return None
        member = found
    return None


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and field of a member's name, or None if it is no part of a sample.

    >>> split_name("dogs.v2/0001.seg.JPG")
    ('dogs.v2/0001', 'seg.jpg')
    """
    split = _NAME.fullmatch(name)
    if split is None or _META.match(name) or posixpath.basename(name).startswith("."):
        return None
    return split[1], split[2].lower()


def _entries(file: Any, key: str, sample: Sample, found: Scan) -> list[Entry]:
    """Return the image of a sample; none if it has neither an image nor a class, as a note about the data set.

    Raises:
        ValueError: if the image or the class is missing, there are several, or they are none.
    """
    image = _pick("image", sample, IMAGES)
    label = _pick("class", sample, ("cls",)) or _pick("class", sample, ("json", "jsn"))
    if image is None and label is not None and not label.endswith("cls") and not _holds_label(file, sample[label]):
        label = None
    found.images += image is not None
    found.classes += label is not None
    if image is None and label is None:
        return []
    if image is None or label is None:
        lacks = "a class <key>.cls" if label is None else "an image <key>.jpg"
        raise ValueError(f"lacks {lacks}, it has only {', '.join(map(printable, sample))}")
    member = sample[image]
    if member.issparse():
        raise ValueError("is stored as a sparse file, whose bytes are not in one piece: write the shard without them")
    stem = image.rpartition(".")[0]
    return [Entry(member.offset_data, member.size, _label(file, label, sample[label]), f"{key}.{image}", stem)]


def _pick(what: str, sample: Sample, extensions: tuple[str, ...]) -> str | None:
    """Return the field with one of these extensions: without a dot, else `img.jpg` or `image.jpg`, else any.

    Raises:
        ValueError: if several are equally good.
    """
    fields = [field for field in sample if field.rpartition(".")[2] in extensions]
    plain = [field for field in fields if "." not in field]
    usual = [field for field in fields if field.rpartition(".")[0] in ("img", "image")]
    chosen = plain or usual or fields
    if len(chosen) > 1:
        raise ValueError(f"has more than one {what}: {', '.join(map(printable, chosen))}. {_DOTS}")
    return chosen[0] if chosen else None


def _label(file: Any, field: str, member: tarfile.TarInfo) -> int:
    """Return the class that a member holds.

    Raises:
        ValueError: if it holds none.
    """
    if member.issparse() or member.size > LONGEST_LABEL:
        raise ValueError(f"has {member.size:,} bytes in its {printable(field)}: expected a whole number")
    file.seek(member.offset_data)
    text = file.read(member.size)
    label = _number(text) if field.endswith("cls") else _number_in_json(text)
    if label is None:
        raise ValueError(
            f"has no class in its {printable(field)}: expected a whole number, got '{printable(text[:40])}'"
        )
    if not 0 <= label < MOST_CLASSES:
        raise ValueError(f"has the class {label} in its {printable(field)}: expected 0 to the number of classes - 1")
    return label


def _holds_label(file: Any, member: tarfile.TarInfo) -> bool:
    with suppress(ValueError):
        return _label(file, "json", member) >= 0
    return False


def _number(text: bytes) -> int | None:
    return int(text) if re.fullmatch(rb"\s*[+-]?[0-9]{1,20}\s*", text) else None


def _number_in_json(text: bytes) -> int | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = [value.get("cls"), value.get("label")] if isinstance(value, dict) else [value]
    numbers = {number for number in values if type(number) is int}
    return numbers.pop() if len(numbers) == 1 else None
