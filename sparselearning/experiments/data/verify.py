"""Look through a data set before a run: `main.py DIR --verify`."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from sparselearning.experiments.data.decoding import open_image, to_rgb, why, without_warnings
from sparselearning.experiments.data.image_sources import ImageSource
from sparselearning.experiments.data.photographs import in_workers, sources

logger = logging.getLogger(__name__)


@dataclass
class Readings(Dataset):
    """Reads and decodes whole images of a source: `readings[index]` is None, or what is wrong with the image."""

    source: ImageSource

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> str | None:
        try:
            with without_warnings():
                to_rgb(open_image(self.source.read(index)))
        except Exception as error:  # Pillow raises many types
            return f"{self.source.name(index)} cannot be read: {why(error)}"
        return None


def verify(location: str, workers: int = 0) -> int:
    """Log every fault of a data set, a line each: folders, shards, labels, images. Return 1 if there are any, else 0.

    Shards are read through, whatever their indices say, and nothing is written.

    Raises:
        DataError: if `location` is no data set; see `photographs.sources`.
    """
    faults: set[str] = set()

    def found(fault: str) -> None:
        if fault not in faults:
            logger.info(fault)
        faults.add(fault)

    parts = sources(location, found, indexed=False)
    for source in parts:
        loader: Iterable = DataLoader(Readings(source), batch_size=64, collate_fn=_faults_of, **in_workers(workers))
        for batch in loader:
            for fault in batch:
                found(fault)
    images = sum(len(source.labels) for source in parts)
    logger.info("%s: %d faults, %d images found in train and val", location, len(faults), images)
    return int(bool(faults))


def _faults_of(readings):
    return [fault for fault in readings if fault]
