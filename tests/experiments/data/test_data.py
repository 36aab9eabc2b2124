"""Data sets in their standard formats, the damage files can have, batches and augmentation."""

import doctest
import os
import pickle

import numpy as np
import pytest
import torch
from data_files import write_cifar_pickles, write_cifar_records, write_idx, write_mnist

from sparselearning.experiments.data import files as datafiles
from sparselearning.experiments.data import in_memory as data_module
from sparselearning.experiments.data.files import MNIST_FILES, DataError
from sparselearning.experiments.data.in_memory import Split, batches, count_batches, crop_and_flip, draw_crops, load

REAL = os.environ.get("SPARSELEARNING_DATA", "/nowhere")


@pytest.fixture
def offline(monkeypatch):
    """Any download fails at once."""

    def fail(folder):
        raise OSError("no network")

    monkeypatch.setattr(datafiles, "_fetch_mnist", fail)
    monkeypatch.setattr(datafiles, "_fetch_cifar", fail)


def same_split(first, second):
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


# The data sets


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


@pytest.mark.parametrize("place", ["MNIST/raw", "", "mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_found_where_it_usually_lies(tmp_path, place, suffix):
    arrays = write_mnist(tmp_path / place, suffix)
    data = load("mnist", tmp_path)
    images = torch.cat([data.train.images, data.valid.images])
    assert torch.equal(images, torch.tensor(arrays[MNIST_FILES[0]], dtype=torch.uint8)[:, None])
    assert torch.equal(torch.cat([data.train.labels, data.valid.labels]), torch.tensor(arrays[MNIST_FILES[1]]))
    assert torch.equal(data.test.images[:, 0], torch.tensor(arrays[MNIST_FILES[2]], dtype=torch.uint8))
    assert torch.equal(data.test.labels, torch.tensor(arrays[MNIST_FILES[3]]))
    assert (data.mean, data.std, data.augment) == ((0.1307,), (0.3081,), False)


@pytest.mark.parametrize("write", [write_cifar_records, write_cifar_pickles])
def test_cifar_is_read_in_both_formats(tmp_path, write):
    pixels, labels = write(tmp_path)
    data = load("cifar", tmp_path, valid_split=0.25)
    train = torch.cat([data.train.images, data.valid.images])
    assert torch.equal(train, torch.tensor(pixels[:5]).view(20, 3, 32, 32))
    assert torch.equal(torch.cat([data.train.labels, data.valid.labels]), torch.tensor(labels[:5]).flatten().long())
    assert torch.equal(data.test.images, torch.tensor(pixels[5]).view(4, 3, 32, 32))
    assert len(data.valid) == 5
    assert data.augment


def test_binary_cifar_comes_first(tmp_path):
    write_cifar_records(tmp_path, count=2)
    write_cifar_pickles(tmp_path, count=3)
    assert len(load("cifar", tmp_path).test) == 2


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


# What the user can do wrong


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


@pytest.mark.usefixtures("offline")
def test_absent_files_are_named_when_offline(tmp_path):
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path / "data")
    message = str(caught.value)
    assert "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k" in message
    assert str(tmp_path / "data" / "MNIST" / "raw") in message
    assert "no network" in message
    assert "--data digits" in message
    with pytest.raises(DataError, match=r"data_batch_1\.bin, .* in .*cifar-10-batches-bin.*--data digits"):
        load("cifar", tmp_path / "data")
    assert not list(tmp_path.iterdir()), "a failed download leaves nothing behind"


@pytest.mark.usefixtures("offline")
def test_one_absent_file_is_named_where_its_siblings_lie(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[3]).unlink()
    with pytest.raises(DataError, match=f"MNIST needs t10k-labels-idx1-ubyte in {tmp_path}, and"):
        load("mnist", tmp_path)
    write_cifar_pickles(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match=r"CIFAR-10 needs test_batch in .*cifar-10-batches-py, and"):
        load("cifar", tmp_path)


def test_absent_files_are_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def fetch(folder):
        calls.append(folder)
        write_mnist(folder / "MNIST" / "raw")

    monkeypatch.setattr(datafiles, "_fetch_mnist", fetch)
    assert same_split(load("mnist", tmp_path / "new").train, load("mnist", tmp_path / "new").train)
    assert len(calls) == 1
    assert (tmp_path / "new" / "MNIST" / "raw" / MNIST_FILES[0]).is_file()


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def fetch(folder):
        write_mnist(folder / "MNIST" / "raw")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datafiles, "_fetch_mnist", fetch)
    with pytest.raises(DataError, match="File not found or corrupted"):
        load("mnist", tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_truncated_mnist_is_refused_with_its_sizes(tmp_path, suffix):
    write_mnist(tmp_path, suffix)
    path = tmp_path / (MNIST_FILES[0] + suffix)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=rf"{path.name} is damaged: expected 23,536 bytes .* got \d\d,\d\d\d\."):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"<html>not found</html>", "expected it to begin with 00 00 08 01 .* got 3c 68 74 6d"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[1]).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("mnist", tmp_path)


def test_what_is_no_gzip_file_is_refused(tmp_path):
    write_mnist(tmp_path, ".gz")
    (tmp_path / (MNIST_FILES[1] + ".gz")).write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz \(22 bytes\) is not a valid gzip file"):
        load("mnist", tmp_path)


def test_images_and_labels_must_fit(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / MNIST_FILES[1], np.zeros(29))
    with pytest.raises(DataError, match=r"expected \[N, 28, 28\] and \[N\], got \[30, 28, 28\] and \[29\]"):
        load("mnist", tmp_path)
    write_idx(tmp_path / MNIST_FILES[1], np.full(30, 10))
    with pytest.raises(DataError, match=r"labels from 0 to 9, got \[10, 10"):
        load("mnist", tmp_path)


def test_truncated_cifar_records_are_refused_with_their_size(tmp_path):
    write_cifar_records(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"data_batch_3.bin is damaged: expected 30,730,000 bytes .* got 12,192\."):
        load("cifar", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"data_batch_3\.bin is damaged"):
        load("cifar", tmp_path)
    path.write_bytes(bytes(2 * 3073))
    with pytest.raises(DataError, match=r"data_batch_3.bin is incomplete: expected 4 images .* got 2\."):
        load("cifar", tmp_path)


def cifar_with_first_pickle(folder, content):
    write_cifar_pickles(folder)
    (folder / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    return folder


def test_truncated_pickle_is_refused(tmp_path):
    content = pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4})
    with pytest.raises(DataError, match=r"data_batch_1 \(10,000 bytes\) cannot be read .*truncated"):
        load("cifar", cifar_with_first_pickle(tmp_path, content[:10_000]))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"data": np.zeros((4, 3072), np.uint8)},
        {"data": np.zeros((4, 3072)), "labels": [0] * 4},
        {"data": np.zeros((4, 100), np.uint8), "labels": [0] * 4},
        {"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3},
        {"data": np.zeros((4, 3072), np.uint8), "labels": ["cat"] * 4},
        {"data": np.zeros((0, 3072), np.uint8), "labels": []},
    ],
)
def test_pickle_of_something_else_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"data_batch_1.* expected"):
        load("cifar", cifar_with_first_pickle(tmp_path, pickle.dumps(content, protocol=4)))


class Reduce:
    """Unpickled without restriction, an object of this class calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("crafted", "culprit"),
    [
        (lambda mark: Reduce(os.mkdir, mark), r"posix\.mkdir"),
        (lambda mark: Reduce(eval, f"__import__('os').mkdir({mark!r})"), r"builtins\.eval"),
        (lambda mark: Reduce(np.load, mark), r"numpy\.load"),
        (lambda mark: np.array([Reduce(os.mkdir, mark)], dtype=object), r"posix\.mkdir"),
        (lambda mark: Reduce(np.zeros(1).tofile, mark), r"builtins\.getattr"),
    ],
)
def test_pickle_that_runs_code_is_refused(tmp_path, crafted, culprit):
    mark = tmp_path / "executed"
    content = pickle.dumps({"data": crafted(str(mark)), "labels": [0]}, protocol=4)
    with pytest.raises(DataError, match=f"refused to load {culprit}, which could run code"):
        load("cifar", cifar_with_first_pickle(tmp_path / "data", content))
    assert not mark.exists()


# Batches


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


def test_docstring_examples():
    assert doctest.testmod(data_module).failed == 0


# Real files, where there are any


def real(name):
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datafiles, "_download", lambda *args: pytest.skip(f"SPARSELEARNING_DATA holds no {name}"))
            return load(name, REAL)
    except DataError as error:
        pytest.fail(str(error))


def test_real_mnist():
    data = real("mnist")
    assert (len(data.train), len(data.valid), len(data.test)) == (54_000, 6_000, 10_000)
    pixels = torch.cat([data.train.images, data.valid.images]).float() / 255
    assert data.mean == (pytest.approx(pixels.mean().item(), abs=1e-4),)
    assert data.std == (pytest.approx(pixels.std().item(), abs=1e-4),)
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_real_cifar_is_the_same_in_both_formats(tmp_path):
    data = real("cifar")
    assert (len(data.train), len(data.valid), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    pickles = os.path.join(REAL, "cifar-10-batches-py")
    if not os.path.isdir(pickles):
        pytest.skip("SPARSELEARNING_DATA holds no pickled CIFAR-10")
    (tmp_path / "cifar-10-batches-py").symlink_to(pickles)
    other = load("cifar", tmp_path)
    assert same_split(data.train, other.train)
    assert same_split(data.test, other.test)
