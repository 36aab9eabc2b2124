"""Parts of photographs: drawn at random or from the middle, cut out and resized."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselearning.experiments.data.decoding import to_rgb

Box = tuple[int, int, int, int]  # left, top, width, height, in pixels


def random_part(width: int, height: int, random: np.random.Generator) -> Box:
    """Draw a part of an image, of 8% to 100% of its area and a width:height between 3:4 and 4:3.

    After ten draws that do not fit into the image, it is the largest square in the middle.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    return middle(width, height, share=1)


def middle(width: int, height: int, share: float = 7 / 8) -> Box:
    """Return the square in the middle of an image; its side is `share` of the image's shorter side."""
    side = max(1, round(min(width, height) * share))
    return (width - side) // 2, (height - side) // 2, side, side


def cut(image: Any, box: Box, size: int) -> Tensor:
    """Return the part `box` of a Pillow image that is not decoded yet, resized to uint8 [3, size, size].

    A JPEG that shrinks at least twofold is decoded at a half, a quarter or an eighth of its size.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    left, top, width, height = box
    shrink = min(width, height) // size
    if shrink < 2:  # torchvision resizes uint8 faster than Pillow
        pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        return F.resized_crop(pixels, top, left, height, width, [size, size], antialias=True)
    full = image.size
    image.draft("RGB", (full[0] // shrink, full[1] // shrink))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    corners = (left * x, top * y, (left + width) * x, (top + height) * y)
    part = to_rgb(image).resize((size, size), Image.Resampling.BILINEAR, box=corners)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)
