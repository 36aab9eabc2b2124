"""Small JPEG photographs that are none: noise around a brightness and a colour of each class."""

import io
import tarfile

import numpy as np
from PIL import Image

SIZES = [(70, 50), (48, 64), (90, 90)]


def jpeg(label, number, mode="RGB"):
    """Return an encoded image of a class."""
    random = np.random.default_rng((label, number))
    width, height = SIZES[number % len(SIZES)]
    colour = np.array([60 + 120 * (label % 2), 60 + 120 * (label // 2), 120])
    pixels = np.clip(colour + random.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_folder(folder, train=16, val=7, classes=4):
    """Write train/<class>/<image> and val/<class>/<image>, `val` images in all; return the folder."""
    for label in range(classes):
        for part, count in (("train", train // classes), ("val", val // classes + (label < val % classes))):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.JPEG").write_bytes(jpeg(label, i + 1000 * (part == "val")))
    return folder


def write_shards(source, folder, parts=("train", "val"), per_shard=3):
    """Write the images of a folder as tar shards in WebDataset's layout; return the folder."""
    folder.mkdir()
    for part in parts:
        images = sorted((source / part).glob("*/*"))
        classes = sorted({path.parent.name for path in images})
        for start in range(0, len(images), per_shard):
            with tarfile.open(folder / f"{part}-{start:06d}.tar", "w") as tar:
                for i, path in enumerate(images[start : start + per_shard], start):
                    add(tar, f"{i:06d}.jpg", path.read_bytes())
                    add(tar, f"{i:06d}.cls", str(classes.index(path.parent.name)).encode())
    return folder


def add(tar, name, content):
    """Add a member to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(path, members):
    """Write a tar file of the members {name: content}; return its path."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add(tar, name, content if isinstance(content, bytes) else content.encode())
    return path
