"""`--evaluate`: what it evaluates, what it needs, and that it leaves everything as it is."""

import os
import re
import shutil

import pytest
import torch
from launch import run as run_processes
from script import draw_nothing, metrics_of, small_network
from small import SMALL, parsed, script

from sparselearning.checkpoint import CheckpointError
from sparselearning.experiments.run.folder import place
from sparselearning.experiments.run.lock import locked
from sparselearning.experiments.run.training import Evaluation
from sparselearning.processes import distributed


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "build_model", small_network)


@pytest.fixture(scope="module")
def trained(photograph_folder, tmp_path_factory):
    """The folder of a run of one epoch, and its record."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        patch.setattr(script, "build_model", small_network)
        path = script.run(parsed(photograph_folder, tmp_path_factory.mktemp("trained"))).path
    return path, metrics_of(path)[0]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def same(result, record):
    assert isinstance(result, Evaluation)
    return (result.accuracy, result.accuracy_in_5, result.loss, result.total) == (
        *(record[name] for name in ("valid_accuracy", "valid_accuracy_5", "valid_loss")),
        7,
    )


def test_evaluation_alone_gives_the_accuracy_of_the_run(trained, photograph_folder, tmp_path):
    path, record = trained
    before = snapshot(path.parent)
    assert same(script.run(script.parse_arguments(["--resume", str(path), "--evaluate"])), record)
    for weights in ("checkpoint.pt", "checkpoint-best.pt"):
        for more in ((), ("--dense",), ("--density", "0.01"), ("--batch-size", "1000"), ("--compile",)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.Module, "compile", lambda model: None)
                given = parsed(photograph_folder, tmp_path, "--pretrained-weights", path / weights, "--evaluate", *more)
                assert same(script.run(given), record)
    assert snapshot(path.parent) == before
    assert not list(tmp_path.iterdir())


def test_the_line_says_what_came_out(trained, caplog):
    caplog.set_level("INFO")
    script.main(["--resume", str(trained[0]), "--evaluate"])
    assert re.search(r"Validation: Average loss: .*, Accuracy: \d/7 \(.*\), in five 100\.000%$", caplog.text.strip())


def test_evaluation_needs_no_training_images_and_no_place_to_write(trained, photograph_folder, tmp_path):
    path, record = trained
    shutil.copytree(photograph_folder / "val", tmp_path / "images" / "val")
    (tmp_path / "file").touch()
    resumed = ["--resume", str(path), "--evaluate", "--data", str(tmp_path / "images"), "--run-dir"]
    assert same(script.run(script.parse_arguments([*resumed, str(tmp_path / "file")])), record)
    weights = ("--pretrained-weights", path / "checkpoint.pt", "--evaluate")
    assert same(script.run(parsed(tmp_path / "images", tmp_path / "file", *weights)), record)


def test_a_run_may_be_evaluated_while_it_trains(trained, photograph_folder):
    path, record = trained
    args = parsed(photograph_folder, path.parent, "--evaluate", "--resume", "auto")
    assert place(args) == path
    with locked(path):
        assert same(script.run(args), record)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--evaluate needs the weights to evaluate: add --resume RUN_FOLDER, or --pretrained-weights FILE"),
        (("--dense",), "--evaluate needs the weights to evaluate"),
        (("--pretrained-weights", "w.pt", "--new-head"), "--evaluate with --new-head would evaluate a classifier"),
        (("--resume", "auto"), "There is no checkpoint .*checkpoint.pt"),
        (
            ("--resume", "auto", "--pretrained-weights", "{path}/checkpoint.pt"),
            "There is no checkpoint .*checkpoint.pt",
        ),
        (("--pretrained-weights", "nowhere.pt"), "There is no checkpoint nowhere.pt"),
    ],
)
def test_evaluation_without_weights_is_refused(
    trained, photograph_folder, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.chdir(tmp_path)
    more = [text.replace("{path}", str(trained[0])) for text in more]
    with pytest.raises(SystemExit) as end:
        script.main([str(photograph_folder), *SMALL.split(), "--evaluate", *more])
    assert end.value.code == 2
    assert re.search(f"^main.py: error: {message}", capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_other_classes_are_refused(trained, photograph_folder, tmp_path):
    shutil.copytree(photograph_folder / "val", tmp_path / "val")
    shutil.rmtree(sorted((tmp_path / "val").iterdir())[0])
    with pytest.raises(CheckpointError, match=r"another classifier: fc\.weight is .* have 3 classes\."):
        script.run(script.parse_arguments(["--resume", str(trained[0]), "--evaluate", "--data", str(tmp_path)]))


def evaluate_together(given):
    os.environ["WORLD_SIZE"] = str(distributed.processes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "build_model", small_network)
        return script.run(script.parse_arguments(given))


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_several_processes_evaluate_all_images(trained, more):
    path, record = trained
    before = snapshot(path.parent)
    for result in run_processes(evaluate_together, 2, ["--resume", str(path), "--evaluate", *more]):
        assert (result.total, result.accuracy) == (7, record["valid_accuracy"])
    assert snapshot(path.parent) == before
