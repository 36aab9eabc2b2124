"""The lock of a run folder, so that one run at a time writes into it.

The file run.lock names the host and the process that hold it. The process also holds an flock on it, which the system
frees when the process ends, however it ends; the file alone tells where a file system has no flock.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparselearning.experiments.run.together import on_first

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
FREE, HELD, NONE = "free", "held", "none"  # what flock says; none: this file system has no flock
ALIVE, DEAD, UNKNOWN = "alive", "dead", "unknown"  # what this machine knows about the process that a lock names

logger = logging.getLogger(__name__)


class Locked(RuntimeError):
    """Another process writes into the run folder."""


@contextmanager
def locked(folder: Path) -> Iterator["FolderLock | None"]:
    """Hold the lock of a run folder, which is made if need be. Of several processes the first one holds it.

    The lock of a process that has ended is taken over.

    Raises:
        Locked: on all processes, if another process holds it.
        OSError: on all processes, if the folder cannot be written.
    """
    held: list[FolderLock] = []
    on_first(lambda: held.append(FolderLock(folder)))
    try:
        yield held[0] if held else None
    finally:
        for lock in held:
            lock.release()


class FolderLock:
    """The lock of `folder`, held until `release`. Raises as `locked` does."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._descriptor = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _take(folder / NAME)
        except OSError as error:
            raise cannot_be_written(folder, error) from error
        finally:
            if self._descriptor is None:
                self._remove_empty()

    def move_aside(self, place: Path) -> None:
        """Rename the folder to `place`, and hold the lock of a new one in its stead."""
        self.folder.rename(place)
        before, self._descriptor = self._descriptor, None
        _end(place / NAME, before)
        self.folder.mkdir()
        self._descriptor = _take(self.folder / NAME)

    def release(self) -> None:
        """Remove the lock, and the folders that were made for it if nothing else is in them."""
        if self._descriptor is not None:
            _end(self.folder / NAME, self._descriptor)
            self._descriptor = None
        self._remove_empty()

    def _remove_empty(self):
        with suppress(OSError):  # they are in use
            for folder in self._made:
                folder.rmdir()


def cannot_be_written(folder: Path, error: OSError) -> OSError:
    """Return the error of a run folder that cannot be made or written."""
    hint = "Choose another place with --run-dir."
    return OSError(f"The run folder {folder} cannot be written: {error}. {hint}")


def _take(file):
    """Create the lock file and return its descriptor, which holds an flock if there is one."""
    while True:
        with suppress(FileExistsError):
            opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o644)
            # The flock may be held: another process has just opened the file and found it empty.
            if _flock(opened) != HELD and os.fstat(opened).st_nlink:
                try:
                    os.write(opened, json.dumps(_this_process()).encode())
                except OSError:
                    _end(file, opened)
                    raise
                return opened
            os.close(opened)
            continue
        _remove_if_stale(file)


def _remove_if_stale(file):
    """Remove the lock file of a process that has ended.

    Raises:
        Locked: if the process may live.
    """
    try:
        opened = os.open(file, os.O_RDWR | NO_LINK)
    except FileNotFoundError:
        return
    try:
        flock, holder = _flock(opened), _read(opened)
        state = _state_of(holder)
        # Where a process was killed, those that it had forked may still hold its flock for some seconds.
        if state == ALIVE or (flock != FREE and state != DEAD):
            raise Locked(_describe(file, holder))
        if not _same(file, opened) or _read(opened) != holder:
            return
        file.unlink(missing_ok=True)
    finally:
        os.close(opened)
    if holder:
        logger.info("Process %(pid)s on %(host)s has left its lock in the run folder; it is taken over.", holder)


def _end(file, opened):
    """Remove a lock file that this process holds."""
    if _same(file, opened):
        file.unlink(missing_ok=True)
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_UN)  # for processes that were forked, too
    os.close(opened)


def _flock(opened):
    if fcntl is None:
        return NONE
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return FREE
    except BlockingIOError:
        return HELD
    except OSError:
        return NONE


def _same(file, opened):
    """Tell whether an open file is still the one at the path."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(opened), file.lstat())
    return False


def _read(opened):
    """Return what a lock file says of its holder, or an empty dict."""
    with suppress(ValueError, OSError):
        os.lseek(opened, 0, os.SEEK_SET)
        holder = json.loads(os.read(opened, 4096))
        if isinstance(holder, dict) and {"host", "pid"} <= holder.keys():
            return holder
    return {}


def _this_process() -> dict[str, Any]:
    return dict(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        began=_began(os.getpid()),
        machine=_machine(),
    )


def _machine():
    """Return what tells this system's numbers of processes from those of others: a container has its own."""
    with suppress(OSError):
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return None


def _state_of(holder):
    if (holder.get("host"), holder.get("machine")) != (socket.gethostname(), _machine()):
        return UNKNOWN
    if holder.get("began") is not None:
        return ALIVE if _began(holder["pid"]) == holder["began"] else DEAD  # another process may have its number now
    if os.name == "nt":  # there os.kill would end the process
        return UNKNOWN
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return DEAD
    except OSError:  # of another user
        return ALIVE
    return ALIVE


def _began(pid):
    """Return when a living process began, in ticks since the system did; None if it has ended, or there is no /proc."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # killed, and its parent has not noticed
    return None


def _describe(file, holder):
    if not holder:
        return f"The run folder {file.parent} is in use by another process. Wait until that has ended. {_instead(file)}"
    return (
        f"The run folder {file.parent} is in use: process {holder['pid']} on {holder['host']} has written there since "
        f"{holder.get('since')}. {_instead(file)}"
    )


def _instead(file):
    return f"Wait for its end, or choose another --run-dir or --seed; if it runs no longer, remove {file}."
