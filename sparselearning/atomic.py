"""Files that are written whole or not at all, with the ones before them kept.

A file is written under the name of a scratch file beside it, `.checkpoint.pt.<16 random hex digits>.scratch`, and then
renamed. The writer holds a lock on it, so that nobody removes the scratch file of a process that lives.
"""

import errno
import glob
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}\.scratch", re.DOTALL)
ABANDONED = 24 * 60 * 60  # seconds after which a scratch file without lock is nobody's, where there are no locks
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any], keep: int = 1) -> None:
    """Call `write` with a scratch file beside `path`, then rename that to `path`, and keep the last `keep` files.

    The file has the permissions of the one that it replaces, or those of any new file. A symbolic link at `path` is
    replaced itself; the file that it names stays as it is.

    Raises:
        OSError: if that fails; the previous file at `path` is then unchanged, and no scratch file stays.
    """
    path = Path(path)
    scratch = None
    try:
        mode = _mode_of(path)
        scratch, opened = _new_scratch(path)
        with os.fdopen(opened, "w+b") as file:
            write(file)
            file.flush()
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(opened, mode)
            os.fsync(opened)
            _make_way(path, keep)
            if os.name != "nt":
                os.replace(scratch, path)  # while it is locked
        if os.name == "nt":
            os.replace(scratch, path)  # which must be closed there
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
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path) -> None:
    """Remove the scratch files that killed processes left; not those that a process is writing.

    These are regular files named as `write_atomically` names them, whose lock is free. Where the file system has no
    locks, they are those that nobody has written to for a day.
    """
    for path in folder.iterdir():
        if SCRATCH.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode):
            with suppress(OSError):  # another process has removed it, or it is not ours to remove
                _remove_abandoned(path)


def versions(path: str | Path) -> list[Path]:
    """Return the existing files among the checkpoint `path` and its older versions, newest first."""
    path = Path(path)
    older = {}
    for other in path.parent.glob(f"{glob.escape(path.stem)}.*{glob.escape(path.suffix)}"):
        number = other.name.removeprefix(f"{path.stem}.").removesuffix(path.suffix)
        if number.isdecimal():
            older[int(number)] = other
    return [path] * path.is_file() + [older[number] for number in sorted(older)]


def _mode_of(path):
    """Return the permissions of the file at `path`, or None if there is none; refuse what a file must not replace."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Expected a file or none, but it is a folder", str(path))
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise FileExistsError(errno.EEXIST, "Expected a file or none, but it is a device, pipe or socket", str(path))
    return stat.S_IMODE(mode) & 0o777 if stat.S_ISREG(mode) else None


def _new_scratch(path):
    """Create a scratch file for `path`, and lock it; return its path and descriptor."""
    while True:
        scratch = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.scratch")
        with suppress(FileExistsError):
            opened = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(opened, fcntl.LOCK_EX)
            if os.fstat(opened).st_nlink:
                return scratch, opened
            os.close(opened)  # `remove_scratch` was faster than the lock


def _remove_abandoned(path):
    opened = os.open(path, os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode) or _is_being_written(opened, found):
            return
        if os.name != "nt":
            path.unlink()  # while it is locked
    finally:
        os.close(opened)
    if os.name == "nt":
        path.unlink()


def _is_being_written(opened, found):
    if fcntl is not None:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return time.time() - found.st_mtime < ABANDONED


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
