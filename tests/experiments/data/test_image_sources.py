"""Photographs in folders and in the shards of WebDataset."""

import os
import tarfile

import pytest
from jpegs import add, jpeg, write_shards
from torchvision.datasets import ImageFolder

from sparselearning.experiments.data.agreement import check_classes
from sparselearning.experiments.data.files import DataError, refuse
from sparselearning.experiments.data.image_sources import FolderSource
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


def tree(folder, *paths):
    """Write an image at each path, and return the folder."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(jpeg(0, 0))
    return folder


def test_the_images_of_folders_are_those_of_torchvision_in_its_order(tmp_path, caplog):
    folder = tree(tmp_path, "b/2.JPG", "b/10.png", "b/sub/1.webp", "b/sub-2/1.bmp", "b/sub/deep/x.tiff", "a/é.ppm")
    tree(folder, "a/.hidden.jpg", "a/.DS_Store", "a/movie.gif", "a/notes.txt", "b/.jpg", "stray.jpg", ".x/1.pgm")
    (folder / "c").symlink_to("b")
    (folder / "a" / "more").symlink_to("../b/sub")
    expected = ImageFolder(folder)
    found = FolderSource(folder)
    assert found.classes == expected.classes == [".x", "a", "b", "c"]
    assert [found.name(i) for i in range(len(found.labels))] == [path for path, _ in expected.samples]
    assert found.labels.tolist() == expected.targets
    (line,) = caplog.messages
    assert line.startswith(f"3 files in {folder} are not read: {folder}/stray.jpg, ")
    assert "movie.gif" in line


@pytest.mark.parametrize("part", ["train", "val"])
def test_all_class_folders_without_images_are_named(tmp_path, part):
    folder = tree(tmp_path, *(f"{part}/{name}/1.jpg" for part in ("train", "val") for name in "abc"))
    for name in ("dog", "cat"):
        for each in ("train", "val"):
            tree(folder, f"{each}/{name}/1.{'txt' if each == part else 'jpg'}")
    with pytest.raises(
        DataError, match=rf"/{part} holds no images in 2 of 5 classes: cat, dog\. Expected <class>/<image>"
    ):
        sources(str(folder))


def test_a_part_without_class_folders_says_so(tmp_path):
    folder = tree(tmp_path, "train/a/1.jpg", "val/1.jpg")
    with pytest.raises(DataError, match=r"/val holds no images in one folder per class: it holds no folders"):
        sources(str(folder))
    with pytest.raises(DataError, match=r"1\.jpg holds no images in one folder per class: Not a directory"):
        FolderSource(folder / "val" / "1.jpg")


def test_class_folders_of_one_part_alone_are_named_with_it(tmp_path):
    folder = tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg", "val/d/1.jpg")
    with pytest.raises(
        DataError, match=r"b, c, d in only one \(train alone has b; val alone has c, d\)\. Expected the same"
    ):
        sources(str(folder))
    tree(folder, *(f"train/{i}/1.jpg" for i in range(100, 200)))
    with pytest.raises(DataError, match=r"train alone has 100, 101, .*, 109 and 91 more; val alone") as error:
        sources(str(folder))
    assert "\n" not in str(error.value)


def test_a_link_to_a_folder_above_is_refused(tmp_path):
    folder = tree(tmp_path, "a/1.jpg", "a/sub/2.jpg")
    (folder / "a" / "sub" / "loop").symlink_to("..")
    with pytest.raises(DataError, match=r"a/sub/loop is a link to a folder that contains it"):
        FolderSource(folder)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    folder = tree(tmp_path, "a/1.jpg", "a/sub/2.jpg")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"a/sub cannot be listed: Permission denied"):
        FolderSource(folder)


def test_names_that_are_no_utf8_and_do_not_print_are_read_and_shown_in_one_line(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.jpg")
    try:
        source = FolderSource(tree(tmp_path, f"clas\t{name}/{name}"))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert source.read(0) == jpeg(0, 0)
    assert source.name(0) == rf"{tmp_path}/clas\tcaf\xe9\n.jpg/caf\xe9\n.jpg"
    with pytest.raises(DataError, match=r"val alone has clas\\tcaf\\xe9\\n\.jpg") as error:
        check_classes(tmp_path, FolderSource(tree(tmp_path / "other", "a/1.jpg")), source, refuse)
    str(error.value).encode()


def test_what_is_named_like_an_image_and_is_none_cannot_be_read(tmp_path):
    folder = tree(tmp_path, "a/0.jpg", "a/1.jpg/2.jpg")
    os.mkfifo(folder / "a" / "2.png")
    (folder / "a" / "3.png").symlink_to("nowhere")
    source = FolderSource(folder)
    assert len(source.labels) == 4
    for i, message in ((1, "it is a folder"), (2, "it is no regular file"), (3, "No such file")):
        with pytest.raises((DataError, OSError), match=message):
            source.read(i)
