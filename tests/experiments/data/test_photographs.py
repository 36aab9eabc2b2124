"""Photographs: which images a step takes, how they are cut, and that neither depends on the processes."""

import shutil
import subprocess
import sys

import pytest
import torch
from jpegs import jpeg

from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.image_sources import FolderSource

CPU = torch.device("cpu")


def all_batches(count, processes, **settings):
    """Return the batches of every process, as [process][batch]."""
    kind = images.TrainingBatches if "accumulate" in settings else images.EvaluationBatches
    return [list(kind(count, rank=rank, processes=processes, **settings)) for rank in range(processes)]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_a_step_takes_the_same_images_on_any_number_of_processes(processes, accumulate):
    alone = list(images.TrainingBatches(23, 8, seed=1, epoch=3))
    together = all_batches(23, processes, batch_size=8, accumulate=accumulate, seed=1, epoch=3)
    assert len(alone) == len(images.TrainingBatches(23, 8)) == 2
    for step, expected in enumerate(alone):
        found = [where for mine in together for i in range(accumulate) for where in mine[step * accumulate + i]]
        assert sorted(found) == sorted(expected)
    assert all(epoch == 3 for batch in alone for epoch, _ in batch)


def test_every_epoch_has_its_own_order_and_leaves_out_different_images():
    orders = [sum(images.TrainingBatches(23, 8, epoch=epoch), []) for epoch in (1, 2)]  # noqa: RUF017
    first, second = ([index for _, index in order] for order in orders)
    assert len(set(first)) == len(set(second)) == 16
    assert set(first) != set(second)
    assert orders[0] == sum(images.TrainingBatches(23, 8, epoch=1), [])  # noqa: RUF017


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_evaluation_shows_every_image_once_and_pads_the_rest(count, processes):
    shares = all_batches(count, processes, batch_size=2)
    assert len({tuple(map(len, batches)) for batches in shares}) == 1, "all processes take as many steps"
    assert all(len(images.EvaluationBatches(count, 2, 0, processes)) == len(batches) for batches in shares)
    shown = [index for batches in shares for batch in batches for _, index in batch]
    assert sorted(index for index in shown if index != images.PADDING) == list(range(count))
    assert len(shown) < count + processes


def test_the_crop_depends_on_seed_epoch_and_index_alone(photograph_folder):
    train, _ = images.sources(str(photograph_folder))
    first, again = (images.Photographs(train, 24, train=True, seed=5) for _ in range(2))
    image, label = first[2, 9]
    assert torch.equal(image, again[2, 9][0])
    assert label == train.labels[9] == 2
    assert image.shape == (3, 24, 24)
    assert image.dtype == torch.uint8
    assert not torch.equal(image, first[3, 9][0])
    assert not torch.equal(image, images.Photographs(train, 24, train=True, seed=6)[2, 9][0])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_become_rgb(photograph_folder, tmp_path, mode):
    shutil.copytree(photograph_folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "class0" / "0.JPEG").write_bytes(jpeg(0, 0, mode))
    _, valid = images.sources(str(tmp_path / "data"))
    image, _ = images.Photographs(valid, 32, train=False)[0, 0]
    assert image.shape == (3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_normalised_and_in_order(photograph_folder, workers):
    _, valid = images.sources(str(photograph_folder))
    photographs = images.Photographs(valid, 16, train=False)
    loader = images.load(photographs, images.EvaluationBatches(7, 4, rank=1, processes=2), workers, CPU)
    ((batch, labels),) = images.on_device(loader, CPU, channels_last=True)
    assert labels.tolist() == [*(valid.labels[i] for i in (1, 3, 5)), images.PADDING]
    assert batch.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.MEAN, images.STD))
    torch.testing.assert_close(batch[0], (photographs[0, 1][0] / 255 - mean) / std)


def test_mistakes_are_named(photograph_folder, tmp_path):
    with pytest.raises(DataError, match="Expected a folder that holds train/ and val/, or webdataset:FOLDER, got /no"):
        images.sources("/no/folder")
    with pytest.raises(DataError, match=r"train holds no images in one folder per class"):
        images.sources(str(tmp_path))
    with pytest.raises(DataError, match=r"There are no shards \*train\*.tar in"):
        images.sources(f"webdataset:{tmp_path}")
    shutil.copytree(photograph_folder, tmp_path / "data")
    (tmp_path / "data" / "val" / "class3").rename(tmp_path / "data" / "val" / "cat")
    with pytest.raises(DataError, match="has different classes in train and val: cat, class3 in only one"):
        images.sources(str(tmp_path / "data"))
    damaged = tmp_path / "data" / "train" / "class0" / "0.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:40])
    source = FolderSource(tmp_path / "data" / "train")
    with pytest.raises(DataError, match=r"0\.JPEG cannot be read"):
        images.Photographs(source, 32, train=True)[1, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_a_worker_too(photograph_folder, tmp_path, workers):
    shutil.copytree(photograph_folder, tmp_path / "data")
    for image in (tmp_path / "data" / "val").glob("*/*"):
        image.write_bytes(image.read_bytes()[:40])
    _, valid = images.sources(str(tmp_path / "data"))
    loader = images.load(images.Photographs(valid, 16, train=False), images.EvaluationBatches(7, 4), workers, CPU)
    with pytest.raises(DataError, match=r"^\S+/val/class0/0\.JPEG cannot be read: .+$"):
        list(images.on_device(loader, CPU))


FAILING = """
import sys, torch
from sparselearning.experiments.data import photographs as images
_, valid = images.sources(sys.argv[1])
photographs = images.Photographs(valid, 16, train=False)
loader = images.load(photographs, images.EvaluationBatches(7, 4), 1, torch.device("cpu"))
next(iter(loader))
raise RuntimeError("unforeseen")
"""


@pytest.mark.long
def test_an_unforeseen_error_does_not_wait_for_the_workers(photograph_folder):
    done = subprocess.run(
        [sys.executable, "-c", FAILING, photograph_folder], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: unforeseen"
