"""Shards: which members are the images and classes of which keys, by the rules of WebDataset, and what is refused."""

import io
import tarfile

import pytest
from jpegs import add, jpeg, tar_of

from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.image_sources import ShardSource, parts_of
from sparselearning.experiments.data.photographs import sources
from sparselearning.experiments.data.shards import scan, split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("dogs/a.b.JPG", ("dogs/a", "b.jpg")),
        ("v1.0/a.cls", ("v1.0/a", "cls")),
        ("./a.cls", ("./a", "cls")),
        ("a.", ("a", "")),
        ("two\nlines.jpg", ("two\nlines", "jpg")),
        ("README", None),
        (".hidden.jpg", None),
        ("dogs/._a.jpg", None),
        ("__meta__.json", ("__meta__", "json")),
        ("__a.json__", None),
        ("__index__/a.jpg", None),
        ("dogs/__a__.jpg", ("dogs/__a__", "jpg")),
    ],
)
def test_a_name_is_split_at_its_first_dot(name, expected):
    assert split_name(name) == expected


def images_of(path):
    """Return the name and the class of each image of a shard that has no fault."""
    found = scan(path)
    assert found.faults == []
    content = path.read_bytes()
    assert all(content[entry.offset :][: entry.size] == jpeg(0, 0) for entry in found.entries)
    return [(entry.name, entry.label) for entry in found.entries]


J = jpeg(0, 0)


def labelled(labels):
    """Return the members of a shard with an image of each class {key: class}."""
    return {**{f"{key}.jpg": J for key in labels}, **{f"{key}.cls": str(label) for key, label in labels.items()}}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.jpg": J, "a.cls": "3", "b.jpg": J, "b.cls": "0"}, [("a.jpg", 3), ("b.jpg", 0)]),
        ({"a.jpg": J, "a.seg.jpg": b"mask", "a.cls": "3"}, [("a.jpg", 3)]),
        ({"a.img.jpg": J, "a.seg.png": b"mask", "a.cls": "3"}, [("a.img.jpg", 3)]),
        ({"a.photo.jpg": J, "a.cls": "3", "b.photo.jpeg": J, "b.cls": "1"}, [("a.photo.jpg", 3), ("b.photo.jpeg", 1)]),
        ({"a.webp": J, "a.cls": "3\n", "b.TIFF": J, "b.CLS": " 1 "}, [("a.webp", 3), ("b.tiff", 1)]),
        ({"a.jpg": J, "a.json": '{"label": 7, "cls_name": "dog"}'}, [("a.jpg", 7)]),
        ({"a.jpg": J, "a.json": '{"cls": 7, "label": "dog"}'}, [("a.jpg", 7)]),
        ({"a.jpg": J, "a.json": "5"}, [("a.jpg", 5)]),
        ({"a.jpg": J, "a.json": '{"label": 9}', "a.cls": "2"}, [("a.jpg", 2)]),
        ({"a.v1.jpg": J, "a.v1.cls": "2"}, [("a.v1.jpg", 2)]),
        ({"a.cls": "2", "b.cls": "1", "b.jpg": J, "a.jpg": J}, [("a.jpg", 2), ("b.jpg", 1)]),
        ({"info.json": "{}", "a.txt": "dog", "README": "", "._a.jpg": "", "c.jpg": J, "c.cls": "1"}, [("c.jpg", 1)]),
    ],
)  # fmt: skip
def test_a_sample_has_one_image_and_one_class(tmp_path, members, expected):
    assert images_of(tar_of(tmp_path / "train.tar", members)) == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": J, "a.cls": "-1"}, r"key a has the class -1 in its cls: expected 0 to the number of classes - 1"),
        ({"a.jpg": J, "a.cls": "dog"}, r"key a has no class in its cls: expected a whole number, got 'dog'"),
        ({"a.jpg": J, "a.cls": ""}, r"key a has no class in its cls"),
        ({"a.jpg": J, "a.cls": "1_0"}, r"key a has no class"),
        ({"a.jpg": J, "a.cls": "1.0"}, r"key a has no class"),
        ({"a.jpg": J, "a.cls": "9" * 5000}, r"key a has no class in its cls: .* got '9{40}'"),
        ({"a.jpg": J, "a.cls": "12345678901234567890"}, r"key a has the class 12345678901234567890"),
        ({"a.jpg": J, "a.json": '{"label": true}'}, r"key a has no class in its json"),
        ({"a.jpg": J, "a.json": '{"label": 1, "cls": 2}'}, r"key a has no class in its json"),
        ({"a.jpg": J, "a.json": "[" * 100_000}, r"key a has no class in its json"),
        ({"a.jpg": J, "b.jpg": J, "b.cls": "1"}, r"2 images .* 1 classes .*: key a lacks a class <key>.cls"),
        ({"a.jpg": J, "a.cls": "1", "b.cls": "1"}, r"1 images .* 2 classes .* key b lacks an image .* only cls"),
        ({"a.jpg": J, "a.cls": "1", "b.json": '{"label": 1}'}, r"key b lacks an image <key>.jpg, it has only json"),
        ({"a.npy": J, "a.cls": "1"}, r"key a lacks an image <key>.jpg, it has only npy, cls"),
        ({"a.jpg": J, "a.png": J, "a.cls": "1"}, r"key a has more than one image: jpg, png"),
        ({"0.5.jpg": J, "0.5.cls": "1", "0.6.jpg": J, "0.6.cls": "2"}, r"key 0 has more than one image: 5.jpg, 6.jpg"),
        ({"a.1.jpg": J, "a.cls": "1", "b.2.jpg": J, "b.cls": "2"}, r"fields, as in b.2.jpg and a.1.jpg. A name is"),
        ({"c.seg.jpg": J, "c.cls": "1", "b.jpg": J, "b.cls": "2"}, r"different fields, as in b.jpg and c.seg.jpg"),
        ({}, r"it holds no images"),
        ({"a.txt": "dog"}, r"it holds no images"),
    ],
)  # fmt: skip
def test_a_sample_that_is_none_is_named_in_one_line(tmp_path, members, message):
    for part in ("train", "val"):
        tar_of(tmp_path / f"{part}.tar", members)
    with pytest.raises(DataError, match=rf"^\S+/train\.tar\b.*{message}") as error:
        sources(f"webdataset:{tmp_path}")
    assert "\n" not in str(error.value)
    assert not [*tmp_path.glob("*.index.json")]


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in (
            ("a.jpg", J),
            ("a.cls", b"1"),
            ("b.jpg", J),
            ("b.cls", b"0"),
            ("a.JPG", J),
            ("a.cls", b"2"),
        ):
            add(tar, name, content)
    with pytest.raises(DataError, match=r"train\.tar: key a has the field jpg twice\..* \(and 1 more faults"):
        ShardSource(tmp_path, "train")


def test_all_faults_of_a_shard_are_found(tmp_path):
    members = {"a.jpg": J, "b.jpg": J, "b.cls": "x", "c.cls": "1", "d.jpg": J, "d.cls": "2"}
    found = scan(tar_of(tmp_path / "train.tar", members))
    assert [entry.name for entry in found.entries] == ["d.jpg"]
    assert [fault.partition("train.tar: ")[2].split(" ")[1] for fault in found.faults] == ["a", "b", "c"]


def linked(tar, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def test_links_within_a_shard_are_what_they_name(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        linked(tar, "d/early.jpg", "a.jpg", tarfile.SYMTYPE)  # before what it names
        add(tar, "d/early.cls", b"4")
        add(tar, "d/a.jpg", J)
        add(tar, "d/a.cls", b"3")
        linked(tar, "d/hard.jpg", "d/a.jpg", tarfile.LNKTYPE)
        linked(tar, "d/hard.cls", "d/a.cls", tarfile.LNKTYPE)
        linked(tar, "e/soft.jpg", "../d/hard.jpg", tarfile.SYMTYPE)
        linked(tar, "e/soft.cls", "../d/early.cls", tarfile.SYMTYPE)
    expected = [("d/early.jpg", 4), ("d/a.jpg", 3), ("d/hard.jpg", 3), ("e/soft.jpg", 4)]
    assert images_of(tmp_path / "train.tar") == expected


@pytest.mark.parametrize("target", ["../../etc/passwd.jpg", "/a.jpg", "gone.jpg", "b.jpg", "sub"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_lead_nowhere_are_named(tmp_path, target, kind):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "a.jpg", J)
        add(tar, "a.cls", b"1")
        linked(tar, "b.jpg", target, kind)
        linked(tar, "b.txt", "nobody/asks", kind)
        add(tar, "b.cls", b"1")
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(
        DataError, match=r"train\.tar\b.*(b\.jpg is a link to .*, which is not in|key b lacks an image)"
    ):
        ShardSource(tmp_path, "train")


def test_a_folder_in_a_shard_is_no_image(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        folder = tarfile.TarInfo("a.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "a.cls", b"1")
    with pytest.raises(DataError, match=r"key a lacks an image"):
        ShardSource(tmp_path, "train")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_are_read_in_every_format(tmp_path, form):
    long = "d" * 90 + "/" + "k" * 90
    with tarfile.open(tmp_path / "train.tar", "w", format=form) as tar:
        for key in ("é", long):
            add(tar, f"{key}.jpg", J)
            add(tar, f"{key}.cls", b"1")
    assert images_of(tmp_path / "train.tar") == [("é.jpg", 1), (f"{long}.jpg", 1)]


def whole_shard(path):
    """Write a shard of three images, and return its bytes and where each member and the end mark begin."""
    tar_of(path, {f"{i}.{kind}": J if kind == "jpg" else str(i) for i in range(3) for kind in ("jpg", "cls")})
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
        return path.read_bytes(), [*starts, tar.offset]


@pytest.mark.parametrize("at", range(7))
def test_a_shard_that_was_cut_is_refused_wherever_it_was_cut(tmp_path, at):
    path = tmp_path / "train.tar"
    content, starts = whole_shard(path)
    for extra in (0, 1, 511, 512, 700):
        path.write_bytes(content[: starts[at] + extra])
        if at == 6 and extra >= 512:  # one block of zeros is an end mark: nothing is lost
            assert len(ShardSource(tmp_path, "train").labels) == 3
        else:
            with pytest.raises(DataError, match=r"train\.tar\b.* (it is not a whole tar file|key \d lacks)"):
                ShardSource(tmp_path, "train")


def test_a_hole_and_a_second_archive_do_not_end_a_shard_early(tmp_path):
    path = tmp_path / "train.tar"
    content, starts = whole_shard(path)
    for damage in (bytes(512), b"x" * 512, content[starts[2] : starts[2] + 500] + b"x" * 12):
        path.write_bytes(content[: starts[2]] + damage + content[starts[2] + 512 :])
        with pytest.raises(DataError, match="is not a whole tar file") as error:
            ShardSource(tmp_path, "train")
        assert str(error.value).count("\n") == 0
    path.write_bytes(content + content)
    with pytest.raises(DataError, match=r"it goes on behind its end mark at byte [\d,]+, where no reader looks"):
        ShardSource(tmp_path, "train")


def negative_size(tmp_path):
    """Return a shard whose first member claims a size below zero, with a right checksum."""
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def test_hostile_and_foreign_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "train.tar"
    zipped = io.BytesIO()
    with tarfile.open(fileobj=zipped, mode="w:gz") as tar:
        add(tar, "a.jpg", J)
    for content in (b"", b"x", b"x" * 5000, zipped.getvalue(), negative_size(tmp_path), J):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^\S+train\.tar: it is not a whole tar file: .+") as error:
            ShardSource(tmp_path, "train")
        assert "\n" not in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"train\.tar(:| it)? .*cannot be read"):
        ShardSource(tmp_path, "train")
    path.rmdir()
    path.symlink_to("gone.tar")
    with pytest.raises(DataError, match=r"train\.tar cannot be read: No such file"):
        ShardSource(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train.tar", ["train"]),
        ("imagenet-train-000123.tar", ["train"]),
        ("imagenet1k-validation-07.tar", ["val"]),
        ("ILSVRC2012_val_0.tar", ["val"]),
        ("Train2017.tar", ["train"]),
        ("training_0.tar", ["train"]),
        ("constrained-000.tar", []),
        ("trainval-0.tar", []),
        ("interval-0.tar", []),
        ("valley.tar", []),
        ("strain.tar", []),
        ("train-val-0.tar", ["train", "val"]),
        ("test-0.tar", []),
    ],
)
def test_a_shard_belongs_to_the_part_that_a_word_of_its_name_says(name, parts):
    assert parts_of(name) == parts


def test_names_of_shards_choose_the_part(tmp_path, caplog):
    for name, label in (("x-train-0", 0), ("x-val-0", 0), ("constrained-0", 1), ("interval-0", 1), ("._x-train-0", 2)):
        tar_of(tmp_path / f"{name}.tar", {"a.jpg": J, "a.cls": str(label)})
    train, valid = sources(f"webdataset:{tmp_path}")
    assert (train.labels.tolist(), valid.labels.tolist()) == ([0], [0])
    assert "2 tar files in" in caplog.text
    assert "constrained-0.tar, interval-0.tar" in caplog.text
    tar_of(tmp_path / "train_val.tar", {"a.jpg": J, "a.cls": "0"})
    with pytest.raises(DataError, match=r"train_val\.tar is named as a shard of train and of val"):
        sources(f"webdataset:{tmp_path}")


def test_a_part_without_shards_says_what_is_there(tmp_path):
    tar_of(tmp_path / "train-0.tar", {"a.jpg": J, "a.cls": "0"})
    with pytest.raises(
        DataError, match=r"no shards \*val\*\.tar in .* the word val, .* The tar files there are train-0"
    ):
        sources(f"webdataset:{tmp_path}")
    with pytest.raises(DataError, match=r"gone cannot be listed: No such file"):
        sources(f"webdataset:{tmp_path}/gone")


def test_a_folder_of_shards_may_have_a_colon_in_its_name(tmp_path):
    folder = tmp_path / "12:30"
    folder.mkdir()
    for part in ("train", "val"):
        tar_of(folder / f"{part}.tar", {"a.jpg": J, "a.cls": "0"})
    train, _ = sources(f"webdataset:{folder}")
    assert train.read(0) == J


@pytest.mark.parametrize(("train", "val", "named"), [((0, 1, 9), (0, 1), "train"), ((0, 1), (0, 2, 1), "val")])
def test_a_class_beyond_those_of_the_other_part_is_named(tmp_path, train, val, named):
    for part, labels in (("train", train), ("val", val)):
        tar_of(tmp_path / f"{part}-0.tar", labelled(dict(enumerate(labels))))
    key, label = max(enumerate(train if named == "train" else val), key=lambda pair: pair[1])
    with pytest.raises(
        DataError, match=rf"{named}-0\.tar: {key}\.jpg has the class {label}, and the highest in the .* is 1"
    ):
        sources(f"webdataset:{tmp_path}")


def test_a_class_without_images_is_named_in_the_log(tmp_path, caplog):
    for part, labels in (("train", (0, 3)), ("val", (3,))):
        tar_of(tmp_path / f"{part}.tar", labelled({label: label for label in labels}))
    train, valid = sources(f"webdataset:{tmp_path}")
    assert train.classes == valid.classes == ["0", "1", "2", "3"]
    assert [record.getMessage().partition(" have ")[2] for record in caplog.records] == [
        "no images of 2 of 4 classes: 1, 2",
        "no images of 3 of 4 classes: 0, 1, 2",
    ]
