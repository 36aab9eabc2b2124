"""Images per second and core that are read, decoded, cropped and resized for training, without a network.

    python benchmarks/image_loading.py
    python benchmarks/image_loading.py --data DIR     with the photographs of DIR/train

Without --data the images are generated noise, which is as expensive to decode as photographs of ImageNet's mean size
(110 KB at 500x375). "Full" decodes the whole image at full size before it crops. Seconds are CPU time of one thread.
"""

import io
import logging
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import parse, ratio, save, summary
from PIL import Image

from sparselearning.experiments.data.cropping import cut, random_part
from sparselearning.experiments.data.image_sources import FolderSource, ShardSource
from sparselearning.experiments.data.photographs import Photographs

SIZES = (224, 128, 64)
COUNT = 200


def main():
    """Measure, log and save."""
    args = parse(__doc__, rounds=7, data=("", "folder with train/<class>/<image>"))
    torch.set_num_threads(1)
    count = 20 if args.quick else COUNT
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.data) / "train" if args.data else generate(Path(scratch) / "train", count)
        files = FolderSource(folder)
        shards = ShardSource(pack(files, Path(scratch), count), "train")
        rows = [measure(args, size, files, shards, count) for size in SIZES]
    save(args, "image_loading", rows)


def measure(args, size, files, shards, count):
    """Return a row: the images per second of each kind of loading, for one crop size."""
    loaders = {
        "files": Photographs(files, size, train=True),
        "shards": Photographs(shards, size, train=True),
        "files, full": FullDecode(files, size, train=True),
    }
    seconds = {kind: [] for kind in loaders}
    for epoch in range(args.rounds + 1):
        for kind, loader in loaders.items():
            started = time.process_time()
            for index in range(count):
                loader[epoch, index]
            seconds[kind].append((time.process_time() - started) / count)
    seconds = {kind: values[1:] for kind, values in seconds.items()}  # the first round warms up
    for kind, values in seconds.items():
        logging.info("%d pixels, %-12s %6.0f images per second and core", size, kind, 1 / summary(values)["median"])
    return {
        "crop": size,
        "images": count,
        "bytes": int(np.mean([len(files.read(index)) for index in range(count)])),
        "seconds per image": {kind: summary(values) for kind, values in seconds.items()},
        "images per second and core": {kind: 1 / summary(values)["median"] for kind, values in seconds.items()},
        "full / files": ratio(seconds["files, full"], seconds["files"]),
        "shards / files": ratio(seconds["shards"], seconds["files"]),
    }


class FullDecode(Photographs):
    """The same images, decoded at full size."""

    def _decode(self, encoded, random):
        image = Image.open(io.BytesIO(encoded)).convert("RGB")  # draft() has no effect any more
        part = cut(image, random_part(*image.size, random), self.size)
        return part.flip(2) if random.random() < 0.5 else part


def generate(folder, count):
    """Write smoothed noise as JPEG of 500x375 pixels and about 110 KB; return the folder."""
    random = np.random.default_rng(0)
    place = folder / "noise"
    place.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
        fine = np.asarray(coarse) * 0.75 + random.normal(32, 12, (375, 500, 3))
        Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8)).save(place / f"{i}.jpg", quality=90)
    return folder


def pack(source, folder, count):
    """Write the first `count` images of a source into one shard; return its folder."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for i in range(count):
            for name, content in ((f"{i:06d}.jpg", source.read(i)), (f"{i:06d}.cls", str(source.labels[i]).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


if __name__ == "__main__":
    main()
