"""Scratch files have names that nobody foresees, follow no links, and alone are removed."""

import os
from pathlib import Path

import pytest

from sparselearning import atomic


def test_a_link_in_the_place_of_the_scratch_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "0" * 2 * size)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / f".c.pt.{'0' * 16}.scratch").symlink_to(precious)
    with pytest.raises(OSError, match="exists"):
        atomic.write_atomically(tmp_path / "c.pt", lambda file: file.write(b"x"))
    assert precious.read_text() == "mine"
    assert not (tmp_path / "c.pt").exists()


def test_names_differ_and_nothing_stays(tmp_path):
    names = []

    def write(file):
        names.extend(path.name for path in tmp_path.glob(".*"))
        file.write(b"x")

    for _ in range(2):
        atomic.write_atomically(tmp_path / "c.pt", write)
    assert len(set(names)) == 2
    assert all(atomic.SCRATCH.fullmatch(name) for name in names)
    assert os.listdir(tmp_path) == ["c.pt"]
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_only_our_scratch_files_are_removed(tmp_path):
    ours = [".c.pt.0123456789abcdef.scratch"]
    others = [".profile.1", ".c.pt.4711", ".notes.2026", ".c.pt.0123.scratch", "c.0123456789abcdef.scratch"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ".link.0123456789abcdef.scratch").symlink_to(tmp_path / "c.pt")
    (tmp_path / ".folder.0123456789abcdef.scratch").mkdir()
    atomic.remove_scratch(Path(tmp_path))
    left = sorted(os.listdir(tmp_path))
    assert left == sorted([*others, ".link.0123456789abcdef.scratch", ".folder.0123456789abcdef.scratch"])
