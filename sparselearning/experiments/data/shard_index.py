"""The index of a shard, kept beside it as <shard>.index.json: where its images are, and of which class.

An index is made by reading through the shard once. It counts as long as the shard has the size and the time of change
(in nanoseconds) that it had then, and the index the checksum that it was written with. Otherwise it is made anew: the
shard knows everything that the index says, so a damaged index is no reason to end a run. It is named in the log.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from sparselearning.checkpoint import write_atomically
from sparselearning.experiments.data.files import DataError, printable, reason
from sparselearning.experiments.data.shards import Entry, Scan, scan

VERSION = 2  # 1 was a list of images, and counted if its file was younger than the shard

logger = logging.getLogger(__name__)
_not_kept: set[Path] = set()  # folders of which the log says already that no index can be written there


def stamp(shard: Path | int) -> tuple[int, int]:
    """Return size in bytes and time of change in nanoseconds of a shard, given by its path or as an open file."""
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns


def index(shard: Path) -> list[Entry]:
    """Return the images of a shard, from its index or by reading through it; the index is then written.

    Where it cannot be written, as in a read-only folder, the log says so once.

    Raises:
        DataError: if the shard cannot be read, or has a fault.
    """
    try:
        now = stamp(shard)
        if (entries := _kept(shard, now)) is not None:
            return entries
        found = scan(shard)
        if found.faults:
            raise DataError(_message(shard, found))
        if stamp(shard) != now:
            raise DataError(f"{printable(shard)} changed while it was read: start again when it is written.")
    except OSError as error:
        raise DataError(f"{printable(shard)} cannot be read: {reason(error)}.") from error
    _keep(shard, now, found.entries)
    return found.entries


def path_of(shard: Path) -> Path:
    """Return where the index of a shard is kept."""
    return shard.with_name(f"{shard.name}.index.json")


def _message(shard, found: Scan):
    """Return the first faults of a shard in one line."""
    first, *others = (fault.removeprefix(f"{printable(shard)}: ") for fault in found.faults)
    more = f" (and {len(others)} more faults; main.py DIR --verify lists all)" if others else ""
    if found.images == found.classes and " lacks " not in first:
        return f"{printable(shard)}: {first}{more}"
    return (
        f"{printable(shard)} holds {found.images} images <key>.jpg and {found.classes} classes <key>.cls. Expected one "
        f"of each for every key: {first}{more}"
    )


def _kept(shard, now) -> list[Entry] | None:
    """Return the images in the index beside a shard, or None if there is no index of the shard as it is `now`."""
    path = path_of(shard)
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, list):
            return None  # of version 1
        if content["version"] != VERSION or (content["size"], content["mtime_ns"]) != now:
            return None
        if content["sha256"] != _checksum(content["images"]):
            raise ValueError("its checksum differs")
        return [Entry(*image) for image in content["images"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        why = reason(error) if isinstance(error, OSError | ValueError) else "it holds something else"
        logger.warning("%s is damaged and is made anew from the shard: %s", printable(path), why)
        return None


def _keep(shard, now, entries):
    size, changed = now
    images = [list(entry) for entry in entries]
    content: dict[str, Any] = dict(version=VERSION, size=size, mtime_ns=changed)
    content |= dict(sha256=_checksum(images), images=images)
    try:
        write_atomically(path_of(shard), lambda file: file.write(json.dumps(content).encode()))
    except OSError as error:
        if shard.parent not in _not_kept:
            _not_kept.add(shard.parent)
            text = "%s cannot be written (%s): every run reads through the shards in this folder at its start."
            logger.warning(text, printable(path_of(shard)), reason(error))


def _checksum(images):
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()
