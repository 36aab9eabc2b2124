"""From an encoded image to RGB with 8 bits, as torchvision's ImageFolder does by default, and why an image has none.

That is Pillow's `convert("RGB")`: the first frame of an animation, colours without transparency, and pixels as they are
stored, because an orientation in the EXIF data is not applied. One thing differs: Pillow cuts grey pixels of more than
8 bits off at 255, which leaves them white. Here 16 bits become the upper 8, as Pillow does for colours. Numbers whose
range nobody knows are refused: 32 bits, signed, or floating-point.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparselearning.experiments.data.files import reason

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # of TIFF
WHITE_IS_ZERO = 0


def open_image(encoded: bytes) -> Any:
    """Return a Pillow image that is not decoded yet; its size is known.

    Raises:
        Exception: of many types, if it is none; see `why`.
    """
    from PIL import Image

    if not encoded:
        raise ValueError("it is empty")
    return Image.open(io.BytesIO(encoded))


def to_rgb(image: Any) -> Any:
    """Return a Pillow image as one of mode RGB.

    Raises:
        Exception: of many types, if it cannot be decoded; see `why`.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32 bits, or signed" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind}, of no known range: convert it to 8 or 16 bits")
    return image.convert("RGB")


def _from_16_bits(image):
    """Return a grey image of mode L; of 12 bits in a TIFF file, the upper 8."""
    from PIL import Image

    tags = vars(image).get("tag_v2", {})
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,)) or (16,)
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep Pillow's warnings to itself, which name no file: large images, odd tags, transparency that is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def why(error: Exception) -> str:
    """Return in a few words why an image cannot be read."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known format"  # Pillow names the buffer
    text = reason(error)
    known = isinstance(error, OSError | ValueError | RuntimeError) or text == type(error).__name__
    return text if known else f"{type(error).__name__}: {text}"
