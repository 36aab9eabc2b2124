"""Data sets in memory: their splits, batches and augmentation."""

import numpy as np
import pytest
import torch
from data_files import same_split, write_mnist

from sparselearning.experiments.data.in_memory import Split, batches, count_batches, crop_and_flip, draw_crops, load


@pytest.mark.long
def test_digits_need_no_files(tmp_path):
    data = load("digits", folder=tmp_path / "missing")
    assert (len(data.train), len(data.valid), len(data.test)) == (1294, 144, 359)
    assert data.train.images.shape[1:] == (1, 28, 28)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.max() == 255
    assert not data.augment
    assert sorted(data.test.labels.unique().tolist()) == list(range(data.classes))
    assert not list(tmp_path.iterdir())


def test_digits_are_split_alike_whatever_the_seed():
    torch.manual_seed(1)
    first = load("digits")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load("digits")
    assert torch.equal(torch.get_rng_state(), state), "loading draws nothing from the global generator"
    assert same_split(first.test, second.test)
    assert first.test.labels[:10].tolist() == [4, 8, 4, 9, 6, 8, 7, 7, 2, 1]


def test_digits_statistics_are_those_of_the_training_pixels():
    data = load("digits", valid_split=0)
    pixels = data.train.images / 255
    assert data.mean == (pytest.approx(pixels.mean().item(), abs=5e-5),)
    assert data.std == (pytest.approx(pixels.std().item(), abs=5e-5),)


def test_validation_is_the_last_part_of_training(tmp_path):
    write_mnist(tmp_path)
    whole, parted = load("mnist", tmp_path, valid_split=0), load("mnist", tmp_path, valid_split=0.2)
    assert whole.valid is None
    assert (len(whole.train), len(parted.train), len(parted.valid)) == (30, 24, 6)
    assert same_split(parted.valid, Split(whole.train.images[24:], whole.train.labels[24:]))


def test_folder_comes_from_the_environment_then_from_here(tmp_path, monkeypatch):
    write_mnist(tmp_path / "elsewhere", train=30)
    write_mnist(tmp_path / "data", train=20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELEARNING_DATA", raising=False)
    assert len(load("mnist", valid_split=0).train) == 20
    monkeypatch.setenv("SPARSELEARNING_DATA", str(tmp_path / "elsewhere"))
    assert len(load("mnist", valid_split=0).train) == 30
    assert len(load("mnist", tmp_path / "data", valid_split=0).train) == 20


def test_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match=r"Unknown data set 'imagenet'\. Choose from: digits, mnist, cifar"):
        load("imagenet")


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_impossible_valid_split_is_refused(fraction):
    with pytest.raises(ValueError, match=r"valid_split .* in \[0, 1\); got"):
        load("digits", valid_split=fraction)


def test_valid_split_must_leave_something_to_train_on(tmp_path):
    write_mnist(tmp_path, train=3)
    with pytest.raises(ValueError, match="holds out all 3 training images"):
        load("mnist", tmp_path, valid_split=0.9)


def random_split(count, channels=3, size=32):
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)
    return Split(images, torch.arange(count))


def test_batches_are_normalised():
    split = random_split(5)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    (first, labels), (second, _) = batches(split, 3, mean=mean, std=std)
    assert (first.dtype, first.shape, second.shape) == (torch.float32, (3, 3, 32, 32), (2, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2]
    expected = (split.images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(torch.cat([first, second]), expected)
    assert split.images.dtype == torch.uint8


@pytest.mark.parametrize(("count", "size", "expected"), [(5, 3, 2), (6, 3, 2), (7, 3, 3), (2, 100, 1)])
def test_count_batches(count, size, expected):
    split = random_split(count, size=2)
    assert count_batches(split, size) == len(list(batches(split, size, mean=[0] * 3, std=[1] * 3))) == expected


def test_shuffling_takes_each_image_once_in_the_order_of_the_seed():
    split = random_split(50, channels=1, size=2)

    def epoch(seed):
        torch.manual_seed(seed)
        pairs = list(batches(split, 8, mean=[0], std=[1 / 255], shuffle=True))
        return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])

    images, labels = epoch(0)
    assert torch.equal(images, split.images[labels].float())
    assert torch.equal(labels.sort().values, split.labels)
    assert torch.equal(labels, epoch(0)[1])
    assert not torch.equal(labels, epoch(1)[1])


def test_an_epoch_resumes_bitwise_in_its_middle():
    split = random_split(20)
    how = {"mean": [0.5] * 3, "std": [0.2] * 3, "augment": True}
    torch.manual_seed(0)
    order = torch.randperm(len(split))
    epoch, states = [], [torch.get_rng_state()]
    for batch in batches(split, 6, order=order, **how):
        epoch.append(batch)
        states.append(torch.get_rng_state())
    torch.set_rng_state(states[2])
    rest = list(batches(split, 6, order=order, start=2, **how))
    assert len(rest) == 2
    for (images, labels), (expected_images, expected_labels) in zip(rest, epoch[2:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_channels_last_changes_the_layout_alone():
    split = random_split(4)
    how = {"mean": [0.5] * 3, "std": [0.2] * 3}
    (plain, _), (strided, _) = (
        next(batches(split, 4, **how)),
        next(batches(split, 4, channels_last=True, **how)),
    )
    assert strided.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, strided)


def slow_crop_and_flip(images, top, left, flip, pad=4):
    """Image by image: pad by reflection, crop, mirror."""
    size = images.shape[-1]
    results = []
    for image, y, x, mirror in zip(images.numpy(), top, left, flip, strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        crop = padded[:, y : y + size, x : x + size]
        results.append(crop[:, :, ::-1] if mirror else crop)
    return torch.tensor(np.stack(results))


def test_augmentation_equals_a_slow_reference():
    torch.manual_seed(0)
    images = random_split(200).images
    drawn = draw_crops(200, images.device)
    assert torch.equal(crop_and_flip(images, *drawn), slow_crop_and_flip(images, *drawn))


def test_batches_augment_each_image_by_its_own_draw():
    split = random_split(10)
    torch.manual_seed(0)
    images, _ = next(batches(split, 10, mean=[0] * 3, std=[1 / 255] * 3, augment=True))
    torch.manual_seed(0)
    expected = slow_crop_and_flip(split.images, *draw_crops(10, split.images.device))
    assert torch.equal(images, expected.float())


def test_crops_and_flips_are_drawn_evenly():
    torch.manual_seed(0)
    top, left, flip = draw_crops(90_000, torch.device("cpu"))
    for corner in (top, left):
        counts = corner.bincount()
        assert len(counts) == 9
        assert (counts - 10_000).abs().max() < 500  # five standard deviations
    assert abs(flip.sum() - 45_000) < 750
    assert (top != left).any()


def test_image_in_the_middle_is_unchanged():
    images = random_split(3).images
    middle = torch.full((3,), 4)
    assert torch.equal(crop_and_flip(images, middle, middle, torch.zeros(3, dtype=torch.bool)), images)
