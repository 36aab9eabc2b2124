"""Files that are written whole or not at all, and their older versions."""

import glob
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}\.scratch")


def versions(path: str | Path) -> list[Path]:
    """Return the existing files among the checkpoint `path` and its older versions, newest first."""
    path = Path(path)
    older = {}
    for other in path.parent.glob(f"{glob.escape(path.stem)}.*{glob.escape(path.suffix)}"):
        number = other.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        if number.isdecimal():
            older[int(number)] = other
    return [path] * path.is_file() + [older[number] for number in sorted(older)]


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any], keep: int = 1) -> None:
    """Call `write` with a scratch file beside `path`, then rename that to `path`, and keep the last `keep` files.

    Raises:
        OSError: if that fails; the previous file at `path` is then unchanged, and no scratch file stays.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.scratch")
    try:
        # A name that nobody foresees, and no link that somebody left there all the same.
        opened = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(opened, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _make_way(path, keep)
        os.replace(scratch, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except RuntimeError as error:
        # torch.save raises its own error on top of the file's.
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove the scratch files of `write_atomically` that killed processes left, and no others."""
    for path in folder.glob(".*.scratch"):
        if SCRATCH.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _make_way(path, keep):
    """Rename path to path.1, path.1 to path.2, and so on; keep the `keep - 1` newest of these and remove the others."""
    if keep == 1:
        return  # os.replace then overwrites `path`, which exists at every moment
    older = [path.with_name(f"{path.stem}.{i}{path.suffix}") for i in range(1, keep)]
    for extra in versions(path):
        if extra not in (path, *older):
            extra.unlink()
    for newer, place in reversed([*zip([path, *older], older, strict=False)]):
        if newer.exists():
            os.replace(newer, place)


def _sync_folder(folder):
    """Flush the entries of a folder to the disk, if the system can."""
    with suppress(OSError, AttributeError):  # network file systems and Windows cannot
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
