"""Damaged data sets, drawn from a seed: every damage is named, or harmless; no image gets the label of another.

A data set is written, one of its files is damaged, and all of its images are read. What is allowed:

- The data set is refused in one line that names the damaged file (or its folder, if the file is gone).
- An image is bad, and named with the damaged file; the others are what they were.
- An image is read. Then its label is the one that the file now gives for its key, in the range of the classes, and its
  bytes are those that the file now holds for it, as another reader of tar files finds them. Damage that leaves a sound
  file with other pixels or another class cannot be seen by anyone, for neither JPEG nor tar has checksums of contents.
- No image is lost: those read and those bad are as many as before, unless the damage took all members of a key away.
"""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from jpegs import add
from PIL import Image

from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.shard_index import path_of
from sparselearning.experiments.data.verify import verify

CLASSES, EACH, SIDE = 3, 2, 16
BLOCK = tarfile.BLOCKSIZE


def picture(label, number):
    pixels = np.random.default_rng((label, number)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return file.getvalue()


PICTURES = {(label, number): picture(label, number) for label in range(CLASSES) for number in range(EACH)}


def members():
    """Return the members of a sound shard, by name."""
    return {
        name: content
        for (label, number), encoded in PICTURES.items()
        for name, content in ((f"{label}-{number}.jpg", encoded), (f"{label}-{number}.cls", str(label).encode()))
    }


def packed(named):
    """Return a tar file of (name, content) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in named:
            add(tar, name, content)
    return file.getvalue()


# Of shards: from the random generator, the whole tar file and its members, the damaged file.


def flipped(random, whole, _):
    at = random.integers(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << random.integers(8)]) + whole[at + 1 :]


def flipped_where_it_matters(random, whole, named):
    name, content = list(named.items())[random.integers(len(named))]
    start = whole.index(name.encode())
    at = start + (random.integers(BLOCK) if random.random() < 0.5 else BLOCK + random.integers(len(content)))
    return whole[:at] + bytes([whole[at] ^ 1 << random.integers(8)]) + whole[at + 1 :]


def cut_short(random, whole, _):
    return whole[: random.integers(len(whole))]


def cut_at_a_block(random, whole, _):
    return whole[: BLOCK * random.integers(len(whole) // BLOCK)]


def overwritten(random, whole, _):
    at = BLOCK * random.integers(len(whole) // BLOCK - 1)
    noise = random.bytes(BLOCK) if random.random() < 0.5 else bytes(BLOCK)
    return whole[:at] + noise + whole[at + BLOCK :]


def without_a_member(random, _, named):
    lost = list(named)[random.integers(len(named))]
    return packed((name, content) for name, content in named.items() if name != lost)


def with_a_member_twice(random, _, named):
    pairs = list(named.items())
    return packed([*pairs, pairs[random.integers(len(pairs))]])


def in_another_order(random, _, named):
    pairs = list(named.items())
    return packed([pairs[i] for i in random.permutation(len(pairs))])


def exchanged(random, _, named):
    """Two members have each other's contents."""
    names, contents = list(named), list(named.values())
    one, other = random.choice(len(names), 2, replace=False)
    contents[one], contents[other] = contents[other], contents[one]
    return packed(zip(names, contents, strict=True))


def of_another_class(random, _, named):
    labels = [name for name in named if name.endswith(".cls")]
    wrong = [b"-1", b"3", b"99", b"", b"dog", b"1.5", b"0x1", b"\xff", b"1 2", b"2"]
    return packed({**named, labels[random.integers(len(labels))]: wrong[random.integers(len(wrong))]}.items())


def with_another_image(random, _, named):
    photographs = [name for name in named if name.endswith(".jpg")]
    name = photographs[random.integers(len(photographs))]
    wrong = [b"", b"<html>404</html>", named[name][: random.integers(len(named[name]))], random.bytes(500)]
    return packed({**named, name: wrong[random.integers(len(wrong))]}.items())


def renamed(random, _, named):
    names = list(named)
    old = names[random.integers(len(names))]
    new = [old.replace(".", ".x."), old.replace(".jpg", ".txt"), "." + old, old.partition(".")[0], "9-" + old]
    new = new[random.integers(len(new))]
    return packed((new if name == old else name, content) for name, content in named.items())


def going_on(random, whole, _):
    return whole + [whole, b"\0" * 999, b"x", random.bytes(BLOCK)][random.integers(4)]


def something_else(random, whole, _):
    return [b"", b"x", b"\0" * 10_240, b"PK\3\4" + whole, random.bytes(2000)][random.integers(5)]


OF_SHARDS = [
    flipped, flipped_where_it_matters, cut_short, cut_at_a_block, overwritten, without_a_member, with_a_member_twice,
    in_another_order, exchanged, of_another_class, with_another_image, renamed, going_on, something_else,
]  # fmt: skip


def shards_in(folder):
    for part in ("train", "val"):
        (folder / f"{part}-0.tar").write_bytes(packed(members().items()))
    return f"webdataset:{folder}"


def content_now(path):
    """Return the members of a tar file as another reader finds them."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def damage_a_shard(folder, random, seed):
    """Damage a shard; sometimes there is an index of it as it was, as young as the shard is now."""
    path = folder / f"{['train', 'val'][random.integers(2)]}-0.tar"
    if random.random() < 0.5:
        images.sources(f"webdataset:{folder}")
    damage = OF_SHARDS[seed % len(OF_SHARDS)]
    status = os.stat(path)
    path.write_bytes(damage(random, packed(members().items()), members()))
    os.utime(path, ns=(0, status.st_mtime_ns + int(random.choice([-(10**10), -1, 1]))))
    if path_of(path).exists() and random.random() < 0.5:
        index = path_of(path).read_bytes()
        path_of(path).write_bytes(flipped(random, index, None))
    return path


def check_shard(source, shard, found, bad):
    """Check the images that were read of a damaged shard."""
    now = content_now(shard)
    keys = {name.partition(".")[0] for name in now}  # of a hidden file ""
    assert len(found) + len(bad) == len(keys - {"", *(name for name in now if "." not in name)})
    for index, label in found.items():
        name = source.name(index).partition(": ")[2]
        assert source.read(index) == now[name]
        assert label == int(now[name.partition(".")[0] + ".cls"])


# Of folders: from the random generator and the path of an image.


def changed_file(change):
    return lambda random, path: path.write_bytes(change(random, path.read_bytes(), None))


def other_file(random, path):
    path.write_bytes([b"", b"x", b"<html>404</html>", random.bytes(400), b"\0" * 400][random.integers(5)])


def a_folder(random, path):
    path.unlink()
    path.mkdir()


def a_broken_link(random, path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


def a_pipe(random, path):
    path.unlink()
    os.mkfifo(path)


def another_ending(random, path):
    path.rename(path.with_suffix(".txt"))


def an_empty_class(random, path):
    for other in path.parent.iterdir():
        other.unlink()


def another_class(random, path):
    path.parent.rename(path.parent.with_name("z"))


OF_FOLDERS = [
    changed_file(flipped), changed_file(cut_short), other_file, a_folder, a_broken_link, a_pipe, another_ending,
    an_empty_class, another_class,
]  # fmt: skip


def folders_in(folder):
    for part in ("train", "val"):
        for (label, number), encoded in PICTURES.items():
            place = folder / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").write_bytes(encoded)
    return str(folder)


def damage_a_folder(folder, random, seed):
    label, number = random.integers(CLASSES), random.integers(EACH)
    path = folder / ["train", "val"][random.integers(2)] / f"class{label}" / f"{number}.jpg"
    OF_FOLDERS[seed % len(OF_FOLDERS)](random, path)
    return path


def check_folder(source, path, found, bad):
    for index, label in found.items():
        name = source.name(index)
        assert f"/class{label}/" in name
        assert source.read(index) == PICTURES[label, int(name[-5])] or name == str(path)
    assert len(found) + len(bad) == len(PICTURES) - (not os.path.lexists(path))


def read_all(source):
    """Return the labels of the images that can be read, by index, and the bad images."""
    photographs = images.Photographs(source, SIDE, train=False)
    found, bad = {}, {}
    for index in range(len(photographs)):
        image, label, faults = photographs.sample(0, index)
        bad |= faults
        if not faults:
            assert image.shape == (3, SIDE, SIDE)
            assert 0 <= label < len(source.classes)
            found[index] = label
    return found, bad


def outcome(folder, seed, caplog):
    """Damage a data set in `folder`, and check what becomes of it; return whether it was refused, or images skipped."""
    random = np.random.default_rng(seed)
    of_shards = seed % 3 < 2
    location = (shards_in if of_shards else folders_in)(folder)
    path = (damage_a_shard if of_shards else damage_a_folder)(folder, random, seed // 3)
    caplog.clear()
    faulty = verify(location)
    listed = "\n".join(caplog.messages)
    try:
        parts, refusal = images.sources(location), None
    except DataError as error:
        parts, refusal = (), str(error)
    if refusal:
        names = [path.name] if of_shards else [path.name, path.parent.name, "z"]
        assert any(name in refusal for name in names), refusal
        assert any(name in listed for name in names), listed
        assert faulty
        assert "\n" not in refusal
        return "refused"
    bad_in_all = {}
    for source, part in zip(parts, ("train", "val"), strict=True):
        found, bad = read_all(source)
        bad_in_all |= bad
        assert all(path.name in name for name in bad), bad
        if part in str(path.relative_to(folder)):
            (check_shard if of_shards else check_folder)(source, path, found, bad)
        else:
            assert (len(found), bad) == (len(PICTURES), {})
    assert faulty == bool(bad_in_all)
    assert all(name in listed for name in bad_in_all)
    return "skipped" if bad_in_all else "sound"


def outcomes(place, seeds, caplog):
    caplog.set_level("INFO")
    counts = dict.fromkeys(("refused", "skipped", "sound"), 0)
    for seed in seeds:
        folder = place / str(seed)
        folder.mkdir()
        try:
            counts[outcome(folder, seed, caplog)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    return counts


@pytest.mark.long
def test_damaged_data_sets_are_named_and_never_mislabelled(tmp_path, caplog):
    torch.set_num_threads(1)
    counts = outcomes(tmp_path, range(210), caplog)
    assert min(counts.values()) > 20, counts


@pytest.mark.slow
def test_thousands_of_damaged_data_sets_are_too(tmp_path, caplog):
    outcomes(tmp_path, range(1000, 6000), caplog)
