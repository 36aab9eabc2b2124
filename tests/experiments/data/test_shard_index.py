"""The index beside a shard: it counts for exactly that shard, and neither a damaged nor a missing one ends a run."""

import errno
import json
import os
import time

import numpy as np
import pytest
from jpegs import jpeg, tar_of

from sparselearning.experiments.data import shard_index
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.image_sources import MOST_OPEN, ShardSource
from sparselearning.experiments.data.shard_index import path_of


def write(path, labels):
    """Write a shard of an image for each label."""
    images = {f"{i}.jpg": jpeg(0, i) for i in range(len(labels))}
    return tar_of(path, {**images, **{f"{i}.cls": str(label) for i, label in enumerate(labels)}})


def labels_in(folder):
    source = ShardSource(folder, "train")
    assert [source.read(i) for i in range(len(source.labels))] == [jpeg(0, i) for i in range(len(source.labels))]
    return source.labels.tolist()


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "train.tar", (0, 1, 2))


def test_an_index_is_used_as_long_as_the_shard_is_the_same(shard, monkeypatch):
    assert labels_in(shard.parent) == [0, 1, 2]
    monkeypatch.setattr(shard_index, "scan", None)
    assert labels_in(shard.parent) == [0, 1, 2]


@pytest.mark.parametrize("age", [-(10**9), -1, 1, 10**9])
def test_a_relabelled_shard_has_its_new_labels_however_old_it_is(shard, age):
    assert labels_in(shard.parent) == [0, 1, 2]
    status = os.stat(shard)
    write(shard, (2, 1, 0))
    assert os.stat(shard).st_size == status.st_size
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + age))
    assert labels_in(shard.parent) == [2, 1, 0]
    assert labels_in(shard.parent) == [2, 1, 0], "from the index that was made anew"


def test_a_shard_of_another_size_and_the_same_time_is_read_anew(shard):
    assert labels_in(shard.parent) == [0, 1, 2]
    status = os.stat(shard)
    write(shard, [3] * 30)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert labels_in(shard.parent) == [3] * 30


def test_no_damage_to_an_index_changes_a_label(shard, caplog):
    """Where bits turn over or the end is missing, an index is made anew, and named unless it looks outdated."""
    assert labels_in(shard.parent) == [0, 1, 2]
    path = path_of(shard)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [whole[:n] for n in random.integers(len(whole), size=10)]
    for at in random.integers(len(whole), size=30):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << random.integers(8)]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        assert labels_in(shard.parent) == [0, 1, 2]
        outdated = b'"version": 2, "size": %d, "mtime_ns": %d,' % shard_index.stamp(shard)
        assert f"{path} is damaged and is made anew" in caplog.text or outdated not in content
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b'"x"',
        b"7",
        b'{"version": 2}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version": 2, "size": 1e999}',
    ],
)
def test_what_is_no_index_is_named_and_made_anew(shard, content, caplog):
    path_of(shard).write_bytes(content)
    assert labels_in(shard.parent) == [0, 1, 2]
    assert content == b'{"version": 2, "size": 1e999}' or f"{path_of(shard)} is damaged" in caplog.text


def test_an_index_of_the_first_version_is_made_anew_without_words(shard, caplog):
    path_of(shard).write_text("[[512, 10, 5]]")
    later = time.time() + 100
    os.utime(path_of(shard), (later, later))
    assert labels_in(shard.parent) == [0, 1, 2]
    assert caplog.text == ""
    assert json.loads(path_of(shard).read_text())["version"] == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_an_index_that_cannot_be_written_is_said_once_and_ends_nothing(shard, monkeypatch, caplog, number):
    write(shard.with_name("train-2.tar"), (5,))

    def fail(path, write):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(shard_index, "write_atomically", fail)
    assert ShardSource(shard.parent, "train").labels.tolist() == [5, 0, 1, 2]
    (line,) = caplog.messages
    assert line.startswith(f"{path_of(shard.with_name('train-2.tar'))} cannot be written ({os.strerror(number)})")
    assert not [*shard.parent.glob("*.json")]


def test_an_index_that_is_a_folder_ends_nothing(shard, caplog):
    path_of(shard).mkdir()
    assert labels_in(shard.parent) == [0, 1, 2]
    assert "is damaged" in caplog.text
    assert "cannot be written" in caplog.text


def test_a_shard_that_changes_while_a_run_reads_it_is_refused(shard):
    first, second = ShardSource(shard.parent, "train"), ShardSource(shard.parent, "train")
    assert first.read(0) == jpeg(0, 0)
    status = os.stat(shard)
    new = write(shard.with_name("new.tar"), (2, 1, 0))
    os.utime(new, ns=(0, status.st_mtime_ns + 1))
    os.replace(new, shard)
    assert first.read(1) == jpeg(0, 1), "the open file is the old one"
    with pytest.raises(DataError, match="the shard has changed since the run began"):
        second.read(1)
    with shard.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match="the shard has changed since the run began"):
        second.read(2)


def test_more_shards_than_a_process_may_open_are_read(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(MOST_OPEN + 20):
        write(tmp_path / f"train-{i:03d}.tar", (0,))
    source = ShardSource(tmp_path, "train", indexed=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MOST_OPEN + 100), hard))
    try:
        assert all(source.read(i) == jpeg(0, 0) for _ in range(2) for i in range(len(source.labels)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
