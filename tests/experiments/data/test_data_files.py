"""MNIST and CIFAR-10 in their standard formats: found, downloaded, and refused where they are damaged."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from data_files import same_split, write_cifar_pickles, write_cifar_records, write_idx, write_mnist

from sparselearning.experiments.data import files
from sparselearning.experiments.data.files import MNIST_FILES, DataError
from sparselearning.experiments.data.in_memory import load

REAL = os.environ.get("SPARSELEARNING_DATA", "/nowhere")


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


@pytest.mark.usefixtures("offline")
def test_missing_files_are_named_when_offline(tmp_path):
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
def test_one_missing_file_is_named_where_its_siblings_lie(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[3]).unlink()
    with pytest.raises(DataError, match=f"MNIST needs t10k-labels-idx1-ubyte in {tmp_path}, and"):
        load("mnist", tmp_path)
    write_cifar_pickles(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match=r"CIFAR-10 needs test_batch in .*cifar-10-batches-py, and"):
        load("cifar", tmp_path)


def test_missing_files_are_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def fetch(folder):
        calls.append(folder)
        write_mnist(folder / "MNIST" / "raw")

    monkeypatch.setattr(files, "_fetch_mnist", fetch)
    assert same_split(load("mnist", tmp_path / "new").train, load("mnist", tmp_path / "new").train)
    assert len(calls) == 1
    assert (tmp_path / "new" / "MNIST" / "raw" / MNIST_FILES[0]).is_file()


def test_two_that_miss_the_files_at_once_download_them_once(tmp_path, monkeypatch):
    missing, looked, fetched = files._missing_mnist, threading.Barrier(2), []

    def look(folder):
        found = missing(folder)
        looked.wait(60)  # both have seen that the files are missing
        return found

    def fetch(folder):
        fetched.append(folder)
        write_mnist(folder / "MNIST" / "raw")

    monkeypatch.setattr(files, "_missing_mnist", look)
    monkeypatch.setattr(files, "_fetch_mnist", fetch)
    with ThreadPoolExecutor(2) as pool:
        (one, _), (other, _) = pool.map(files.read_mnist, [tmp_path / "data"] * 2)
    assert (one[0] == other[0]).all()
    assert len(fetched) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def fetch(folder):
        write_mnist(folder / "MNIST" / "raw")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(files, "_fetch_mnist", fetch)
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


def real(name):
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "download", lambda *args: pytest.skip(f"SPARSELEARNING_DATA holds no {name}"))
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
