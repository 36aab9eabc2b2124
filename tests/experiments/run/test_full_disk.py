"""A disk that is full at any file of a run: one line says what could not be written, what is kept, how to go on."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from jpegs import write_folder
from script import draw_nothing, load_main, metrics_of, run_folder, small_network

from sparselearning.experiments.report import plots

SCRIPTS = {folder: load_main(folder) for folder in ("mnist_cifar", "imagenet")}
SMALL = "--epochs 2 --device cpu --max-threads 1"
GIVEN = {
    "mnist_cifar": f"--data digits --batch-size 300 {SMALL}",
    "imagenet": f"photographs --arch resnet18 --image-size 32 --batch-size 8 --workers 0 --gather-checkpoints {SMALL}",
}
NO_SPACE = os.strerror(errno.ENOSPC)


@pytest.fixture
def end_with(tmp_path, monkeypatch, caplog, capsys):
    """Make a run in which a file cannot be written the n-th time; return the line that it ends with."""
    draw_nothing(monkeypatch)
    caplog.set_level("INFO")
    monkeypatch.setattr(SCRIPTS["imagenet"], "build_model", small_network)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photographs")

    def end_with(script, full, time, *more):
        replace, seen = os.replace, []

        def refuse(source, place):
            seen.append(Path(place).name)
            if seen.count(full) == time and seen[-1] == full:
                raise OSError(errno.ENOSPC, NO_SPACE)
            replace(source, place)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(SystemExit) as end:
                SCRIPTS[script].main([*GIVEN[script].split(), *more])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return end_with


@pytest.mark.parametrize(
    ("script", "full", "time", "epochs"),
    [
        ("mnist_cifar", "metrics.jsonl", 2, 0),
        ("mnist_cifar", "metrics.jsonl", 3, 1),
        ("mnist_cifar", "checkpoint.pt", 2, 1),
        ("mnist_cifar", "metrics.jsonl", 4, 2),
        ("imagenet", "checkpoint.pt", 1, 0),
        ("imagenet", "checkpoint-best.pt", 1, 1),
        ("imagenet", "checkpoint-2.pt", 1, 2),
    ],
)
def test_a_run_says_what_could_not_be_written_and_goes_on(end_with, script, full, time, epochs):
    line = end_with(script, full, time)
    folder = run_folder("runs")
    what = "The checkpoint" if full == "checkpoint.pt" else full
    assert line.startswith(f"main.py: error: {what} cannot be written: [Errno 28] {NO_SPACE}")
    if epochs:
        (kept,) = re.findall(r"The last checkpoint is kept in (\S+)\. Make room", line)
        assert line.endswith(f"Make room, and go on with --resume {folder}.")
        assert torch.load(kept)["epoch"] == epochs
    else:
        assert line.endswith("There is no checkpoint yet. Make room, and start the run again.")
    SCRIPTS[script].main([*GIVEN[script].split(), "--resume", "auto"])
    found = sorted(Path("runs").iterdir())[0]
    metrics = metrics_of(found)
    assert [record["epoch"] for record in metrics if "epoch" in record] == [1, 2]
    if script == "imagenet":
        copies = {epoch: torch.load(found / f"checkpoint-{epoch}.pt") for epoch in (1, 2)}
        assert {epoch: copy["epoch"] for epoch, copy in copies.items()} == {1: 1, 2: 2}
        accuracies = [record["valid_accuracy"] for record in metrics]
        best = 2 - accuracies[::-1].index(max(accuracies))
        assert torch.load(found / "checkpoint-best.pt")["epoch"] == best
    assert not [path for path in found.iterdir() if path.name.startswith(".")]


def test_a_run_that_is_killed_before_its_best_checkpoint_is_copied_copies_it_later(end_with, monkeypatch):
    end_with("imagenet", "checkpoint-best.pt", 1, "--epochs", "1")
    folder = run_folder("runs")
    assert not (folder / "checkpoint-best.pt").exists()
    SCRIPTS["imagenet"].main(["--resume", str(folder)])
    assert (folder / "checkpoint-best.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("picture", ["curves", "density"])
def test_pictures(end_with, monkeypatch, picture):
    def refuse(*_):
        raise OSError(errno.ENOSPC, NO_SPACE)

    monkeypatch.setattr(plots, f"plot_{picture}", refuse)
    line = end_with("mnist_cifar", "none", 0)
    assert line.startswith(
        f"main.py: error: {picture}.png cannot be written: [Errno 28] {NO_SPACE}. The last checkpoint"
    )


def test_what_is_asked_for_beside_the_run(end_with):
    more = ("--model", "lenet5", "--epochs", "1", "--valid_split", "0.9")
    line = end_with("mnist_cifar", "features.npz", 1, *more, "--save-features", "--save-model", "w.pt")
    assert line.startswith(f"main.py: error: features.npz cannot be written: [Errno 28] {NO_SPACE}")
    assert torch.load("w.pt")
    line = end_with("mnist_cifar", "w.pt", 1, *more, "--resume", "auto", "--save-model", "w.pt")
    assert line.startswith(f"main.py: error: w.pt cannot be written: [Errno 28] {NO_SPACE}")
    line = end_with("mnist_cifar", "args.json", 1, *more)
    assert "cannot be written: [Errno 28]" in line
    assert line.endswith("Choose another place with --run-dir.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("resume", [False, True])
def test_the_log(end_with, resume):
    if resume:
        SCRIPTS["mnist_cifar"].main([*GIVEN["mnist_cifar"].split(), "--epochs", "1"])
        log = run_folder("runs") / "log.txt"
        log.unlink()
    else:
        args = SCRIPTS["mnist_cifar"].parse_arguments([*GIVEN["mnist_cifar"].split(), "--epochs", "1"])
        log = SCRIPTS["mnist_cifar"].place(args) / "log.txt"
        log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    line = end_with("mnist_cifar", "none", 0, "--epochs", "1", *(["--resume", "auto"] if resume else []))
    assert line.startswith(f"main.py: error: log.txt cannot be written: [Errno 28] {NO_SPACE}")
    assert line.endswith(f"go on with --resume {log.parent}." if resume else "and start the run again.")


@pytest.mark.parametrize("left", [b"", b'{"traceEvents": ['])
def test_a_trace_is_written_whole_or_not_at_all(end_with, monkeypatch, left):
    def fill(profiler, path):
        Path(path).write_bytes(left)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fill)
    line = end_with("imagenet", "none", 0, "--prof")
    assert line.startswith(f"main.py: error: trace.json cannot be written: [Errno 28] {NO_SPACE}")
    assert {path.name for path in run_folder("runs").iterdir()} == {"args.json", "log.txt", "metrics.jsonl"}
