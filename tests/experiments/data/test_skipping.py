"""Bad images that are skipped: what takes their place, how they are counted, and when a run ends."""

import shutil

import numpy as np
import pytest
import torch
from jpegs import jpeg
from launch import run

from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.image_sources import FolderSource

CPU = torch.device("cpu")
COUNT = 12


@pytest.fixture
def folder(tmp_path):
    """Return three classes of four images."""
    for i in range(COUNT):
        place = tmp_path / "abc"[i // 4]
        place.mkdir(exist_ok=True)
        (place / f"{i:02d}.jpg").write_bytes(jpeg(i // 4, i))
    return tmp_path


def spoil(folder, *numbers):
    for i in numbers:
        (folder / "abc"[i // 4] / f"{i:02d}.jpg").write_bytes(b"spoilt")


def photographs_of(folder, limit, train):
    return images.Photographs(FolderSource(folder), 16, train=train, seed=3, skips=images.Skips(limit))


def batches_of(photographs, workers=0, rank=0, processes=1, batch_size=4):
    share = dict(rank=rank, processes=processes)
    if photographs.train:
        order = images.TrainingBatches(len(photographs), batch_size, **share, seed=3)
    else:
        order = images.EvaluationBatches(len(photographs), batch_size, **share)
    loader = images.load(photographs, order, workers, CPU)
    assert len(loader) == len(order)
    return list(loader)


def test_the_next_good_image_takes_the_place_in_training(folder):
    whole = photographs_of(folder, 0, train=True)
    spoil(folder, 3, 4, 11)
    photographs = photographs_of(folder, 3, train=True)
    for index, taken in ((2, 2), (3, 5), (4, 5), (11, 0)):
        image, label = photographs[2, index]
        assert label == whole.source.labels[taken]
        # The part and the mirroring are those of the place, so the same image twice in a step is cut twice.
        assert torch.equal(image, whole._decode(whole.source.read(taken), np.random.default_rng((3, 2, index))))
    assert not torch.equal(photographs[2, 3][0], photographs[2, 4][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_keeps_its_shapes_and_its_order(folder, workers, caplog):
    whole = batches_of(photographs_of(folder, 0, train=True))
    spoil(folder, 3, 7)
    found = batches_of(photographs_of(folder, 2, train=True), workers)
    again = batches_of(photographs_of(folder, 2, train=True))
    assert [(*pixels.shape, *labels.shape) for pixels, labels in found] == [(4, 3, 16, 16, 4)] * 3
    for (pixels, labels), (same, same_labels) in zip(found, again, strict=True):
        assert torch.equal(pixels, same)
        assert torch.equal(labels, same_labels)
        assert (labels >= 0).all()
    assert torch.cat([(x != y).flatten(1).any(1) for (x, _), (y, _) in zip(found, whole, strict=True)]).sum() == 2
    names = [message.split(" ")[0].rpartition("/")[2] for message in caplog.messages]
    assert sorted(names) == ["03.jpg", "03.jpg", "07.jpg", "07.jpg"], "once in each of the two runs"


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_count_them(folder, workers, caplog):
    whole = torch.cat([labels for _, labels in batches_of(photographs_of(folder, 0, train=False))])
    spoil(folder, 0, 5)
    found = batches_of(photographs_of(folder, 2, train=False), workers)
    labels = torch.cat([labels for _, labels in found])
    assert labels.tolist() == [images.PADDING if i in (0, 5) else label for i, label in enumerate(whole.tolist())]
    assert all(len(pixels) == 4 for pixels, _ in found)
    assert [message.partition("(")[2].partition(")")[0] for message in caplog.messages] == [
        "1 of at most 2",
        "2 of at most 2",
    ]


@pytest.mark.long
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("limit", "workers"), [(0, 0), (0, 1), (2, 0), (2, 2)])
def test_one_more_ends_the_run_with_one_line(folder, limit, workers, train):
    spoil(folder, *range(1, limit + 2))
    with pytest.raises(
        DataError, match=r"^\S+/[ab]/0\d\.jpg cannot be read: it is no image of a known format\. "
    ) as error:
        batches_of(photographs_of(folder, limit, train), workers)
    assert f"--skip-bad-images {limit or 'N'}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_training_and_evaluation_have_one_limit_and_a_second_epoch_counts_nothing_again(folder, caplog):
    spoil(folder, 1, 2)
    skips = images.Skips(2)
    train, valid = (images.Photographs(FolderSource(folder), 16, train=kind, skips=skips) for kind in (True, False))
    for _ in range(2):
        batches_of(train)
        batches_of(valid)
    assert len(caplog.messages) == 2
    skips.limit = 1
    valid.skips = images.Skips(1)
    with pytest.raises(DataError, match="--skip-bad-images 1 skips no more"):
        batches_of(valid)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("limit", [COUNT, 100])
def test_a_source_without_a_good_image_is_refused(folder, limit, train):
    spoil(folder, *range(COUNT))
    with pytest.raises(DataError, match=r"None of the 12 images can be read, such as \S+\.jpg: it is no image"):
        batches_of(photographs_of(folder, limit, train))


def labels_together(*cases):
    """Return for each case (folder, limit, train) this process's labels or error, and how many bad images it knows."""
    results = []
    for folder, limit, train in cases:
        photographs = photographs_of(folder, limit, train)
        try:
            batches = batches_of(photographs, 0, torch.distributed.get_rank(), processes=2)
            results.append((torch.cat([labels for _, labels in batches]).tolist(), len(photographs.skips.met)))
        except DataError as error:
            results.append((str(error), len(photographs.skips.met)))
    return results


@pytest.mark.long
def test_processes_know_of_each_others(folder, tmp_path_factory):
    """One bad image in each process's share; and then all are bad."""
    bad = shutil.copytree(folder, tmp_path_factory.mktemp("bad") / "all")
    spoil(folder, 0, 1)
    spoil(bad, *range(COUNT))
    alone = torch.cat([labels for _, labels in batches_of(photographs_of(folder, 2, True))]).tolist()
    cases = (folder, 2, False), (folder, 1, False), (folder, 2, True), (bad, COUNT, False)
    skipped, too_many, trained, none = zip(*run(labels_together, 2, *cases), strict=True)
    assert [known for _, known in skipped] == [2, 2]
    assert sorted(skipped[0][0] + skipped[1][0]) == [images.PADDING] * 2 + [0] * 2 + [1] * 4 + [2] * 4
    for message, _ in too_many:
        assert "cannot be read: it is no image of a known format. --skip-bad-images 1 skips no more" in message
    assert sorted(trained[0][0] + trained[1][0]) == sorted(alone)
    for message, _ in none:
        assert message.startswith("None of the 12 images can be read")
