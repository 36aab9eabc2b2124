"""Parts of photographs: where they lie, and how they are decoded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from sparselearning.experiments.data.cropping import cut, random_part


def test_a_random_part_lies_in_the_image_and_has_its_area_and_shape():
    random = np.random.default_rng(0)
    boxes = [random_part(400, 300, random) for _ in range(500)]
    area = np.array([width * height for _, _, width, height in boxes]) / (400 * 300)
    shape = np.array([width / height for _, _, width, height in boxes])
    assert 0.079 < area.min() < 0.12
    assert 0.8 < area.max() <= 1
    assert 0.73 < shape.min() < 0.8
    assert 1.25 < shape.max() < 1.36
    assert all(0 <= left <= 400 - width and 0 <= top <= 300 - height for left, top, width, height in boxes)
    assert random_part(1000, 10, random) == (495, 0, 10, 10), "no part of this image has a fitting shape"


@pytest.mark.parametrize("size", [20, 40, 80])
def test_decoding_at_a_smaller_scale_gives_nearly_the_same_image(size):
    y, x = np.mgrid[:240, :320]
    pixels = np.stack([x * 255 / 320, y * 255 / 240, 128 + 100 * np.sin(x / 25)], axis=2).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    box = (40, 24, 200, 160)
    found = cut(Image.open(file), box, size)
    expected = F.resized_crop(torch.tensor(pixels).permute(2, 0, 1), 24, 40, 160, 200, [size, size], antialias=True)
    assert (found.float() - expected.float()).abs().mean() < 2.5
