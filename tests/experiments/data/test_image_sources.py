"""Photographs in folders and in the shards of WebDataset."""

import tarfile

import pytest
from jpegs import add, jpeg, write_shards

from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.photographs import sources


def test_shards_hold_the_images_of_the_folder(photograph_folder, tmp_path):
    shards = write_shards(photograph_folder, tmp_path / "shards")
    for expected, found in zip(sources(str(photograph_folder)), sources(f"webdataset:{shards}"), strict=True):
        assert found.labels.tolist() == expected.labels.tolist()
        assert [found.read(i) for i in range(len(found.labels))] == [
            expected.read(i) for i in range(len(expected.labels))
        ]
    assert len(list(shards.glob("*.index.json"))) == len(list(shards.glob("*.tar")))
    again, _ = sources(f"webdataset:{shards}")  # from the saved index
    assert again.read(3) == sources(str(photograph_folder))[0].read(3)


@pytest.mark.parametrize("place", ["./", "n01440764/", "ILSVRC2012.v2/train/"])
def test_members_of_a_shard_may_lie_in_folders(tmp_path, place):
    # A key ends at the first dot of the file's name, as in the WebDataset library.
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for i in range(3):
                add(tar, f"{place}{i}.jpg", jpeg(0, i))
                add(tar, f"{place}{i}.cls", b"0")
    train, _ = sources(f"webdataset:{tmp_path}")
    assert [train.read(i) for i in range(3)] == [jpeg(0, i) for i in range(3)]


def test_shards_of_the_webdataset_library_are_read(photograph_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    train, _ = sources(str(photograph_folder))
    for part in ("train", "val"):
        with webdataset.TarWriter(str(tmp_path / f"{part}-0.tar")) as writer:
            for i, label in enumerate(train.labels.tolist()):
                writer.write({"__key__": f"{i:04d}", "jpg": train.read(i), "cls": label})
    found, _ = sources(f"webdataset:{tmp_path}")
    assert found.labels.tolist() == train.labels.tolist()
    assert found.read(5) == train.read(5)


def test_a_shard_without_classes_is_named(tmp_path):
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            add(tar, "0.jpg", jpeg(0, 0))
    with pytest.raises(DataError, match=r"train\.tar holds 1 images <key>\.jpg and 0 classes <key>\.cls"):
        sources(f"webdataset:{tmp_path}")
