"""A run that goes on from a checkpoint which somebody damaged says in one line which entry is wrong."""

import copy
import math
import re

import pytest
import torch
from script import checkpoint_of, load_main, runner

from sparselearning import archive
from sparselearning.experiments.run.stopping import StopRequests

main = load_main()


def put(state, *path):
    """Set the entry at path[:-1] to path[-1]."""
    *keys, last, value = path
    for key in keys:
        state = state[key]
    state[last] = value


DAMAGES = {
    "no epoch": (("epoch", None), "'epoch'.* got None"),
    "an epoch below zero": (("epoch", -1), "'epoch'.* got -1"),
    "half an epoch": (("epoch", 0.5), "'epoch'.* got 0.5"),
    "an epoch without end": (("epoch", 10**400), "'epoch'.* got a long number"),
    "metrics of numbers": (("metrics", [1]), "'metrics'"),
    "no metrics": (("metrics", None), "'metrics'.* got None"),
    "progress that is none": (("progress", 3), "'progress'.* got 3"),
    "steps below zero": (("progress", "steps", -5), "'steps'.* got -5"),
    "a loss that is none": (("progress", "loss", math.nan), "'loss'.* got nan"),
    "time that runs back": (("progress", "seconds", -1e9), "'seconds'.* got -1"),
    "a word of another version": (("progress", "more", 1), "'more' too"),
    "an order of floats": (("progress", "order", torch.zeros(5)), "'order'.*torch.float32"),
    "an order of other images": (("progress", "order", torch.arange(5)), "'order'"),
    "gradients of no weight": (("gradients", {"x": torch.ones(1)}), "'x' too"),
    "a gradient of another shape": (("gradients", {"fc1.weight": torch.ones(1)}), "fc1.weight"),
    "processes that are none": (("processes", {"random": 1}), "'processes'"),
    "a process without numbers": (("processes", [{}]), "got no random"),
    "a schedule of text": (("scheduler", "step_size", "long"), "scheduler.*'step_size'.* got 'long'"),
    "a schedule that is no schedule": (("scheduler", "step", "now"), "scheduler.*'step'"),
    "a rate of no number": (("scheduler", "_last_lr", [math.nan]), "_last_lr"),
    "rates of other groups": (("scheduler", "base_lrs", [0.1, 0.1]), "base_lrs"),
    "a loss scale that is none": (("precision", {"scale": "much"}), "precision"),
}


@pytest.fixture
def stopped(tmp_path, monkeypatch, caplog):
    """A run that was stopped after three steps, and how to make it go on."""
    requests = iter([None, None, 15])
    monkeypatch.setattr(StopRequests, "requested", lambda self: next(requests, None))
    run = runner(main, tmp_path, monkeypatch, caplog, "--device", "cpu", "--max-threads", "1")
    with pytest.raises(SystemExit):
        run("--data", "digits", "--epochs", "2")
    (folder,) = (tmp_path / "runs").iterdir()
    return folder, lambda: run("--resume", folder / "checkpoint.pt")


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_of_a_run_is_named(change, message, stopped, capsys):
    folder, go_on = stopped
    state = copy.deepcopy(checkpoint_of(folder))
    assert state["progress"]["steps"] == 3
    put(state, *change)
    with (folder / "checkpoint.pt").open("w+b") as file:
        archive.write(state, file)  # with valid checksums
    with pytest.raises(SystemExit) as ended:
        go_on()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ")
    assert re.search(message, line)


def test_an_undamaged_run_goes_on(stopped):
    _, go_on = stopped
    assert checkpoint_of(go_on())["epoch"] == 2
