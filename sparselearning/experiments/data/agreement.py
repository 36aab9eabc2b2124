"""Whether the training and the validation images have the same classes.

A class folder without images is refused in either part, as torchvision does: a network would have an output that is
never trained, or never evaluated. Shards hold numbers alone. The highest must be the same in both parts, for it says
how many outputs a network has; a lower number without images is named in the log, because a part of a data set may
lack it.
"""

import logging
from pathlib import Path

import numpy as np

from sparselearning.experiments.data.files import printable
from sparselearning.experiments.data.image_sources import FolderSource, Found, ShardSource, shorten

logger = logging.getLogger(__name__)


def check_classes(place: Path, train: FolderSource, valid: FolderSource, found: Found) -> None:
    """Check that both parts have the same class folders, and name those that are in only one."""
    if not train.classes or not valid.classes or train.classes == valid.classes:
        return  # where a part has no classes, that has been said
    alone = [sorted({*one.classes} - {*other.classes}) for one, other in ((train, valid), (valid, train))]
    names = shorten(sorted(alone[0] + alone[1]))
    each = [f"{part} alone has {shorten(only)}" for part, only in zip(("train", "val"), alone, strict=True) if only]
    found(
        f"{printable(place)} has different classes in train and val: {names} in only one "
        f"({'; '.join(each)}). Expected the same class folders in both."
    )


def check_labels(place: Path, train: ShardSource, valid: ShardSource, found: Found) -> None:
    """Check that the highest class of both parts is the same, and name the image whose class is too high."""
    counts = len(train.classes), len(valid.classes)
    if not all(counts):
        return
    for part, other, most in ((train, "val", counts[1]), (valid, "train", counts[0])):
        for i in np.flatnonzero(part.labels >= most).tolist()[:10]:
            found(
                f"{part.name(i)} has the class {part.labels[i]}, and the highest in the {other} shards is {most - 1}: "
                f"expected the same classes in both, 0 to the number of classes - 1."
            )
    for part, title in ((train, "train"), (valid, "val")):
        missing = sorted({*range(max(counts))} - {*part.labels.tolist()})
        if missing and len(part.classes) == max(counts):
            text = "The %s shards in %s have no images of %d of %d classes: %s"
            names = shorten([str(label) for label in missing])
            logger.warning(text, title, printable(place), len(missing), max(counts), names)
