"""A run that does not learn says so, once: in its log, and in its metrics."""

import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
from jpegs import write_folder
from script import draw_nothing, load_main, metrics_of, run_folder

from sparselearning.experiments.report import results
from sparselearning.experiments.run import chance
from sparselearning.experiments.run.chance import at_chance, remedies, warn_at_chance
from sparselearning.experiments.run.stopping import StopRequests

SCRIPTS = {folder: load_main(folder) for folder in ("mnist_cifar", "imagenet")}
FLAGS = {
    "mnist_cifar": "--data digits --batch-size 300",
    "imagenet": "photographs --arch resnet18 --image-size 32 --batch-size 4 --workers 0 --warmup 0",
}
CHANCE = 2.3  # a loss at chance among ten classes


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Make a run in this process, in which 6 steps are enough; return its folder."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chance, "STEPS", 6)
    draw_nothing(monkeypatch)
    write_folder(tmp_path / "photographs")

    def run(script, argv):
        SCRIPTS[script].main([*FLAGS[script].split(), *["--device", "cpu", "--max-threads", "1"], *argv.split()])
        return run_folder("runs")

    return run


def warnings_of(folder):
    return [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("WARNING")]


@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_cannot_learn_says_so_once(run, script):
    folder = run(script, "--lr 0 --epochs 4")
    (line,) = warnings_of(folder)
    assert "still at chance after 2 epochs" in line
    assert "--rescale" in line
    assert [record["at_chance"] for record in metrics_of(folder) if "epoch" in record] == [True] * 4
    position = (folder / "log.txt").read_text()
    assert position.index("epoch 2 ") < position.index("WARNING") < position.index("epoch 3 ")
    assert "at chance" not in position.replace(line, "")


def test_a_run_that_learns_says_nothing(run):
    folder = run("mnist_cifar", "--lr 0.05 --density 0.5 --epochs 3 --batch-size 50")
    assert not warnings_of(folder)
    assert metrics_of(folder)[2]["at_chance"] is False
    assert results.read(folder)[0].at_chance is False


@pytest.mark.parametrize("stopped_in", [1, 2, 3])
def test_a_run_that_goes_on_neither_repeats_nor_loses_the_warning(run, monkeypatch, stopped_in):
    whole_epochs = math.ceil(1294 / 300)
    calls = iter(range(1, 10_000))
    with monkeypatch.context() as patch:
        asked = (stopped_in - 1) * whole_epochs + 2
        patch.setattr(StopRequests, "requested", lambda _: 15 * (next(calls) == asked))
        with pytest.raises(SystemExit, match="143"):
            run("mnist_cifar", "--lr 0 --epochs 4 --valid_split 0")
    folder = run("mnist_cifar", "--lr 0 --epochs 4 --valid_split 0 --resume auto")
    assert len(warnings_of(folder)) == 1
    assert len(metrics_of(folder)) == 5
    assert results.read(folder)[0].at_chance


def test_the_margin_is_one_percent():
    limit = 0.99 * math.log(10)
    assert at_chance({"train_loss": limit}, 10)
    assert not at_chance({"train_loss": limit - 1e-6}, 10)
    assert at_chance({"train_loss": 90.0}, 10)  # worse than guessing
    assert not at_chance({"train_loss": limit}, 11)


def test_a_penalty_is_no_loss():
    penalised = {"train_loss": 5.0}
    assert at_chance(penalised | {"valid_loss": 2.31}, 10, l1=1e-4)
    assert not at_chance(penalised | {"valid_loss": 0.3}, 10, l1=1e-4)
    assert not at_chance(penalised, 10, l1=1e-4)


def records(*steps, chance=None):
    chance = chance or [True] * len(steps)
    return [{"steps": s, "train_loss": CHANCE, "at_chance": c} for s, c in zip(steps, chance, strict=True)]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (records(600), False),  # one epoch
        (records(600, 1200), True),
        (records(600, 1200, 1800), False),  # said before
        (records(50, 100, 150), False),  # too few steps
        (records(50, 100, 150, 200), True),
        (records(50, 100, 150, 200, 250), False),
        (records(600, 1200, chance=[True, False]), False),
        (records(600, 1200, chance=[False, True]), False),
        ([{"test_accuracy": 0.1}, *records(600, 1200)], True),
        ([{"steps": 600, "train_loss": CHANCE}, *records(1200)], False),  # of a version that did not record it
    ],
)
def test_when_it_is_said(metrics, said, caplog):
    warn_at_chance(metrics, Namespace(lr=0.1, dense=True), 10)
    assert bool(caplog.records) == said


def test_the_remedies_are_those_not_yet_tried():
    given = SimpleNamespace(lr=0.1, dense=False, rescale=False, inactive="zero", sparse_init="constant", density=0.01)

    def flags(**changes):
        said = " ".join(remedies(Namespace(**{**vars(given), **changes})))
        return [flag for flag in ("--lr", "--rescale", "--sparse-init", "--density") if flag in said]

    assert flags() == ["--lr", "--rescale", "--sparse-init", "--density"]
    assert flags(dense=True) == ["--lr"]
    assert flags(rescale=True) == flags(inactive="kept") == ["--lr", "--sparse-init", "--density"]
    assert flags(sparse_init="erdos_renyi_kernel") == ["--lr", "--rescale", "--density"]
