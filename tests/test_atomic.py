"""Files are written whole or not at all, with ordinary permissions, and only abandoned scratch files are removed."""

import os
import re
import signal
import stat
import subprocess
import sys

import pytest

from sparselearning import atomic
from sparselearning.atomic import remove_scratch, write_atomically

DIGITS = "0123456789abcdef"
needs_posix = pytest.mark.skipif(os.name == "nt", reason="permissions and locks of POSIX")


def write_x(file):
    file.write(b"x")


def scratch_names(folder):
    """Return the names of scratch files that one write makes in a folder."""
    names = []
    write_atomically(folder / "c.pt", lambda file: names.extend(n for n in os.listdir(folder) if n != "c.pt"))
    return names


def test_a_scratch_file_cannot_be_foreseen(tmp_path):
    names = [name for _ in range(20) for name in scratch_names(tmp_path)]
    assert len(set(names)) == 20
    assert all(re.fullmatch(r"\.c\.pt\.[0-9a-f]{16}\.scratch", name) for name in names)


@needs_posix
def test_a_link_in_the_place_of_the_scratch_file_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_bytes(b"kept")
    given = iter([DIGITS, DIGITS[::-1]])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: next(given))
    (tmp_path / f".c.pt.{DIGITS}.scratch").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "c.pt", write_x)
    assert (tmp_path / "precious").read_bytes() == b"kept"
    assert (tmp_path / "c.pt").read_bytes() == b"x"
    assert (tmp_path / f".c.pt.{DIGITS}.scratch").is_symlink()


@needs_posix
def test_a_new_file_has_the_permissions_of_any_new_file_and_another_keeps_its_own(tmp_path):
    path = tmp_path / "c.pt"
    before = os.umask(0o027)
    try:
        write_atomically(path, write_x)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_atomically(path, write_x)
        write_atomically(path, write_x, keep=2)
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@needs_posix
def test_a_link_at_the_path_is_replaced_and_what_it_names_stays(tmp_path):
    (tmp_path / "other").write_bytes(b"kept")
    (tmp_path / "c.pt").symlink_to(tmp_path / "other")
    write_atomically(tmp_path / "c.pt", write_x)
    assert not (tmp_path / "c.pt").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"kept"


@needs_posix
def test_a_pipe_or_a_folder_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a device, pipe or socket"), ("folder", "a folder")):
        with pytest.raises(OSError, match=f"Expected a file or none, but it is {kind}.*{name}"):
            write_atomically(tmp_path / name, write_x)
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    write_atomically(tmp_path / ("x" * 250), write_x)
    write_atomically(tmp_path / ("ä" * 120), write_x)
    assert len(os.listdir(tmp_path)) == 2


def test_only_our_own_scratch_files_are_removed(tmp_path):
    others = [".checkpoint.pt.4711", ".version.2", f".{DIGITS}.scratch", f"c.pt.{DIGITS}.scratch"]
    others += [f".c.pt.{DIGITS.upper()}.scratch", f".c.pt.{DIGITS}0.scratch", f".c.pt.{DIGITS}.scratch.1"]
    for name in (*others, f".c.pt.{DIGITS}.scratch"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".folder.{DIGITS}.scratch").mkdir()
    remove_scratch(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f".folder.{DIGITS}.scratch"])


@needs_posix
def test_neither_links_nor_what_they_name_are_removed(tmp_path):
    (tmp_path / "precious").write_bytes(b"kept")
    (tmp_path / f".c.pt.{DIGITS}.scratch").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / f".pipe.{DIGITS}.scratch")
    remove_scratch(tmp_path)
    assert len(os.listdir(tmp_path)) == 3


WRITER = """
import sys, time
from sparselearning.atomic import write_atomically
def write(file):
    file.write(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
write_atomically(sys.argv[1], write)
"""


@pytest.mark.long
@needs_posix
@pytest.mark.parametrize("killed", [False, True])
def test_the_scratch_file_of_a_process_stays_while_it_lives(tmp_path, killed):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "c.pt")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin
        assert writer.stdout
        assert writer.stdout.readline() == b"writing\n"
        remove_scratch(tmp_path)
        assert len(os.listdir(tmp_path)) == 1
        if killed:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        else:
            writer.stdin.write(b"\n")
    remove_scratch(tmp_path)
    assert os.listdir(tmp_path) == ([] if killed else ["c.pt"])


@needs_posix
def test_without_locks_the_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    young, old = tmp_path / f".young.{DIGITS}.scratch", tmp_path / f".old.{DIGITS}.scratch"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    remove_scratch(tmp_path)
    assert os.listdir(tmp_path) == [young.name]
    write_atomically(tmp_path / "c.pt", write_x)
    assert (tmp_path / "c.pt").read_bytes() == b"x"


@needs_posix
def test_a_scratch_file_that_was_removed_before_its_lock_is_made_again(tmp_path, monkeypatch):
    lock, taken = atomic.fcntl.flock, []

    def remove_first(opened, operation):
        if not taken:
            taken.append(next(iter(tmp_path.iterdir())))
            taken[0].unlink()
        lock(opened, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", remove_first)
    write_atomically(tmp_path / "c.pt", write_x)
    assert os.listdir(tmp_path) == ["c.pt"]
