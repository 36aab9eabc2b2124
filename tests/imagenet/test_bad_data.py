"""imagenet/main.py on data sets with faults: runs that skip bad images, and --verify."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from jpegs import jpeg, tar_of, write_folder, write_shards
from script import ROOT, draw_nothing, load_main, run_folder, without_times
from torch import nn

from sparselearning.experiments.data.image_sources import FolderSource

script = load_main("imagenet")
SMALL = "--arch resnet18 --image-size 16 --batch-size 8 --epochs 2 --device cpu --dense".split()  # noqa: SIM905


def small_network(args, classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, classes))


@pytest.fixture(autouse=True)
def _quick(monkeypatch, caplog):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "build_model", small_network)
    caplog.set_level("INFO")


@pytest.fixture
def folder(tmp_path):
    """Return photographs of which two are bad in train, and one in val."""
    folder = write_folder(tmp_path / "data")
    (folder / "train" / "class1" / "2.JPEG").write_bytes(b"")
    (folder / "train" / "class2" / "0.JPEG").write_bytes(jpeg(2, 0)[:500])
    (folder / "val" / "class2" / "1.JPEG").write_bytes(b"<html>")
    return folder


def run(*argv):
    """Type a command in this process; return its exit status and its error."""
    try:
        script.main(list(map(str, argv)))
    except SystemExit as exit_:
        return exit_.code
    return 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_run_skips_bad_images_and_names_each_once(folder, tmp_path, workers, capfd):
    more = ["--workers", workers, "--run-dir", tmp_path / "runs"]
    assert run(folder, *SMALL, *more, "--skip-bad-images", 2) == 2
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .startswith(f"main.py: error: {folder}/val/class2/1.JPEG cannot be read: it is no image")
    )
    shutil.rmtree(tmp_path / "runs")
    assert run(folder, *SMALL, *more, "--skip-bad-images", 3) == 0
    path = run_folder(tmp_path / "runs")
    log = (path / "log.txt").read_text()
    for name in ("train/class1/2.JPEG", "train/class2/0.JPEG", "val/class2/1.JPEG"):
        assert log.count(f"{folder}/{name} cannot be read and is skipped (") == 1
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record["steps"] for record in metrics] == [2, 4]
    assert all(round(record["valid_accuracy"] * 6, 6).is_integer() for record in metrics), "of 7 images 6 count"


def records(place):
    """Return the metrics of the only run in a place."""
    return [json.loads(line) for line in (run_folder(place) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_run_that_met_a_bad_image_goes_on_when_it_may_skip_it(folder, tmp_path, capfd):
    """The name of the run does not change with --skip-bad-images, and the resumed run is the uninterrupted one."""
    workers = ("--workers", 0)
    assert run(folder, *SMALL, *workers, "--run-dir", tmp_path / "whole", "--skip-bad-images", 3) == 0
    whole = records(tmp_path / "whole")
    spoilt = folder / "val" / "class2" / "1.JPEG"
    other = tmp_path / "other"
    spoilt.rename(other)
    shutil.copy(folder / "val" / "class0" / "0.JPEG", spoilt)
    assert run(folder, *SMALL, *workers, "--run-dir", tmp_path / "runs", "--skip-bad-images", 2) == 0
    first = run_folder(tmp_path / "runs")
    (first / "checkpoint.1.pt").replace(first / "checkpoint.pt")  # as if it had been stopped after an epoch
    other.replace(spoilt)
    capfd.readouterr()
    assert run(folder, *SMALL, *workers, "--run-dir", tmp_path / "runs", "--resume", "auto") == 2
    assert "cannot be read" in capfd.readouterr().err
    given = ("--run-dir", tmp_path / "runs", "--resume", "auto", "--skip-bad-images", 3)
    assert run(folder, *SMALL, *workers, *given) == 0
    assert without_times(records(tmp_path / "runs"))[1] == without_times(whole)[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_lists_all_that_is_bad_with_status_1(folder, workers, caplog):
    (folder / "train" / "class0" / "x.jpg").mkdir()
    (folder / "val" / "empty").mkdir()
    assert run(folder, "--verify", "--workers", workers) == 1
    *faults, last = (message for message in caplog.messages if " faults, " in message or str(folder) in message)
    expected = [
        "/val holds no images in 1 of 5 classes: empty",
        " has different classes in train and val: empty in only one (val alone has empty)",
        "/train/class0/x.jpg cannot be read: it is a folder",
        "/train/class1/2.JPEG cannot be read: it is empty",
        "/train/class2/0.JPEG cannot be read: ",
        "/val/class2/1.JPEG cannot be read: it is no image of a known format",
    ]
    assert len(faults) == len(expected)
    assert all(fault.startswith(f"{folder}{words}") for fault, words in zip(faults, expected, strict=True)), faults
    assert last == f"{folder}: 6 faults, 24 images found in train and val"


def test_verify_of_sound_data_has_status_0(tmp_path, caplog):
    folder = write_folder(tmp_path / "data")
    assert run(folder, "--verify", "--workers", 0) == 0
    assert caplog.messages == [f"{folder}: 0 faults, 23 images found in train and val"]
    shards = write_shards(folder, tmp_path / "shards")
    before = sorted(shards.iterdir())
    assert run(f"webdataset:{shards}", "--verify", "--workers", 0) == 0
    assert sorted(shards.iterdir()) == before, "nothing is written"


def test_verify_lists_faults_of_shards(tmp_path, caplog):
    J = jpeg(0, 0)
    tar_of(tmp_path / "train-0.tar", {"a.jpg": J, "a.cls": "0", "b.jpg": b"bad", "b.cls": "1", "c.jpg": J})
    tar_of(tmp_path / "train-1.tar", {"a.jpg": J, "a.cls": "x", "b.jpg": J, "b.cls": "7", "c.cls": "-1", "c.jpg": J})
    tar_of(tmp_path / "val-0.tar", {"a.jpg": J, "a.cls": "0", "b.jpg": J, "b.cls": "1"})
    whole = (tmp_path / "val-0.tar").read_bytes()
    (tmp_path / "val-1.tar").write_bytes(whole[:-10240])
    (tmp_path / "val-train.tar").write_bytes(whole)
    assert run(f"webdataset:{tmp_path}", "--verify", "--workers", 0) == 1
    listed = "\n".join(caplog.messages)
    for line in (
        "val-train.tar is named as a shard of train and of val",
        "train-0.tar: key c lacks a class",
        "train-0.tar: b.jpg cannot be read: it is no image of a known format",
        "train-1.tar: key a has no class in its cls",
        "train-1.tar: key c has the class -1",
        "train-1.tar: b.jpg has the class 7, and the highest in the val shards is 1",
        "val-1.tar: it is not a whole tar file: ",
        ": 7 faults, ",
    ):
        assert listed.count(line) == 1, line


@pytest.mark.long
def test_verify_needs_a_place_and_no_model(tmp_path, capfd):
    assert run(tmp_path / "gone", "--verify") == 2
    assert "Expected a folder that holds train/ and val/" in capfd.readouterr().err
    assert run("--verify") == 2
    folder = write_folder(tmp_path / "data")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "imagenet" / "main.py"), str(folder), "--verify", "--arch", "timm:none"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder}: 0 faults, 23 images found in train and val\n"
    assert not (tmp_path / "runs").exists()


def test_verify_reads_every_image(tmp_path, monkeypatch):
    read, read_image = [], FolderSource.read
    monkeypatch.setattr(FolderSource, "read", lambda self, index: read.append(index) or read_image(self, index))
    assert run(write_folder(tmp_path / "data"), "--verify", "--workers", 0) == 0
    assert read == [*range(16), *range(7)]
