"""A run stopped at any step goes on as if it had not been: signals, --resume auto, damaged and absent checkpoints."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import run as run_processes
from script import (
    FOLDER,
    assert_equal,
    assert_same_run,
    checkpoint_of,
    load_main,
    metrics_of,
    run_folder,
    runner,
    without_times,
)

from sparselearning import checkpoint
from sparselearning.experiments.data import in_memory as datasets
from sparselearning.experiments.run.stopping import Stopped, StopRequests
from sparselearning.experiments.run.training import Progress
from sparselearning.processes import distributed
from sparselearning.sparse import available

DIGITS = ("--data", "digits", "--epochs", "2", "--device", "cpu", "--max-threads", "1", "--batch-size", "300")
STEPS = 5  # of an epoch
main = load_main()


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Make a run on the digits in this process, without its pictures; return its folder."""
    return runner(main, tmp_path, monkeypatch, caplog, *DIGITS)


def said(capsys):
    """The line that the script ended with; on stderr are also lines of the log, which tqdm passes on."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("main.py: ")]
    assert line == lines[-1]
    return line


@pytest.fixture
def stop(run, monkeypatch, capsys):
    """Make a run that gets a signal in its n-th step, or n-th batch of evaluation; return the line it says."""

    def stop(*argv, step=None, batch=None, number=signal.SIGTERM):
        seen = {"add": 0, "argmax": 0}

        def count(of, name, at):
            original = getattr(of, name)

            def counting(*arguments, **more):
                seen[name] += 1
                if seen[name] == at:
                    signal.raise_signal(number)
                return original(*arguments, **more)

            patch.setattr(of, name, counting)

        with monkeypatch.context() as patch:
            count(Progress, "add", step)
            count(torch.Tensor, "argmax", batch)
            with pytest.raises(SystemExit) as end:
                run(*argv)
        assert end.value.code == 128 + number
        return said(capsys)

    return stop


# Signals


@pytest.mark.parametrize("step", [1, 4, STEPS, STEPS + 1, 2 * STEPS])
def test_a_run_stopped_at_a_step_goes_on_to_the_bit(run, stop, monkeypatch, step):
    # Random crops and random growth: all that draws numbers.
    monkeypatch.setitem(datasets.SOURCES, "digits", replace_augment(datasets.SOURCES["digits"]))
    more = "--growth", "random", "--optimizer", "adam", "--lr", "0.001"
    whole = run(*more, place="whole")
    line = stop(*more, step=step)
    epoch, done = divmod(step - 1, STEPS)
    place = f"in epoch {epoch + 1} after step {done + 1} of 5"
    assert line.startswith(f"main.py: stopped by SIGTERM; {place if step % STEPS else 'in the evaluation after epoch'}")
    assert "runs/digits-lenet300-100-0.05-17-" in line
    torch.rand(3)
    assert_same_run(run(*more, "--resume", "auto"), whole)


def replace_augment(source):
    return source._replace(augment=True)


@pytest.mark.parametrize(
    ("batch", "place"), [(1, "in the evaluation after"), (2, "in the evaluation after"), (3, "after")]
)
def test_a_run_stopped_in_its_evaluation_goes_on_to_the_bit(run, stop, tmp_path, batch, place):
    (tmp_path / "own.py").write_text(
        "from sparselearning.selection import add_highest\n"
        "def grow(masking, name, new_mask, total_regrowth, weight):\n"
        "    return add_highest(weight.grad.abs(), new_mask, total_regrowth)\n"
    )
    more = "--test-batch-size", "50", "--growth", f"{tmp_path}/own.py:grow"  # reads gradients after the evaluation
    whole = run(*more, place="whole")
    assert f"stopped by SIGTERM; {place} epoch 1;" in stop(*more, batch=batch)
    assert_same_run(run(*more, "--resume", "auto"), whole)


@pytest.mark.long
@pytest.mark.skipif(not available(), reason="built without sparse kernels")
@pytest.mark.parametrize("more", [(), ("--method", "rigl", "--prune-every-k-steps", "7")])
def test_a_run_on_sparse_kernels_stopped_in_an_epoch_goes_on_to_the_bit(run, stop, more):
    more = "--sparse-backend", "cpu", "--epochs", "4", *more
    whole = run(*more, place="whole")
    for step in (3, 5, 7):
        stop(*more, "--resume", "auto", step=step)
    assert_same_run(run(*more, "--resume", "auto"), whole)


def test_a_run_stopped_again_and_again_goes_on_to_the_bit(run, stop):
    whole = run("--epochs", "3", place="whole")
    for step in (3, 4, 2, 1):
        stop("--epochs", "3", "--resume", "auto", step=step)
    assert_same_run(run("--epochs", "3", "--resume", "auto"), whole)


def test_a_signal_in_the_test_ends_the_run_at_once(run, stop):
    line = stop("--valid_split", "0", batch=1)
    assert line == "main.py: stopped by SIGTERM; the same command with --resume auto goes on from the last checkpoint"
    assert "test_loss" in metrics_of(run("--valid_split", "0", "--resume", "auto"))[-1]


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a process that a shell started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_ends_at_once():
    with StopRequests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested() == signal.SIGINT
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_thread_other_than_the_main_one_leaves_signals_alone():
    seen = []

    def work():
        with StopRequests():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@pytest.mark.long
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_gets_a_signal_writes_a_checkpoint_and_ends(tmp_path, number, status):
    argv = [*DIGITS, "--epochs", "2000", "--checkpoint-every", "1"]
    command = [sys.executable, str(FOLDER / "main.py"), *argv]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("runs/*/checkpoint.1.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
        sent = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - sent < 20
    assert process.returncode == status
    folder = run_folder(tmp_path / "runs")
    assert errors.startswith(f"main.py: stopped by {number.name}; ")
    assert errors.endswith(f"; --resume runs/{folder.name} goes on from there\n")
    assert checkpoint_of(folder)["progress"] is None or checkpoint_of(folder)["progress"]["steps"] > 0


# --resume auto, --checkpoint-every, --keep


def test_auto_begins_a_run_that_has_no_checkpoint_and_says_so(run, caplog):
    folder = run("--epochs", "1", "--resume", "auto")
    assert f"There is no checkpoint in {folder}: a new run begins." in caplog.text
    assert [record.get("epoch") for record in metrics_of(folder)] == [1, None]


def test_auto_goes_on_with_each_of_several_seeds(run, tmp_path):
    def results():
        return {folder.name: without_times(metrics_of(folder)) for folder in (tmp_path / "runs").iterdir()}

    for argv in ((), ("--resume", "auto")):
        with pytest.raises(ValueError, match="too many values"):
            run("--iters", "2", "--epochs", "1", *argv)
        if not argv:
            first = results()
    assert results() == first


def test_the_last_k_checkpoints_are_kept(run):
    folder = run("--checkpoint-every", "2", "--keep", "4")
    kept = checkpoint.versions(folder / "checkpoint.pt")
    assert [path.name for path in kept] == ["checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt", "checkpoint.3.pt"]
    states = [torch.load(path) for path in kept]
    steps = [5 * state["epoch"] + (state["progress"] or {"steps": 0})["steps"] for state in states]
    assert steps == [10, 8, 6, 5]


def test_a_run_goes_on_from_any_kept_checkpoint_to_the_bit(run, tmp_path):
    more = "--growth", "random", "--checkpoint-every", "2", "--keep", "4"
    whole = run(*more)
    for back in (1, 2, 3):
        copy = shutil.copytree(whole, tmp_path / f"from {back}" / whole.name)
        assert run(*more, "--resume", copy / f"checkpoint.{back}.pt", place=f"from {back}") == copy
        assert_same_run(copy, whole)
        assert not list(copy.glob(".*"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(run, caplog):
    folder = run("--checkpoint-every", "2", "--keep", "3")
    whole = checkpoint_of(folder)
    newest, before = folder / "checkpoint.pt", folder / "checkpoint.1.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    run("--checkpoint-every", "2", "--keep", "3", "--resume", "auto")
    assert f"{newest} is damaged or not a checkpoint" in caplog.text
    assert f"Taking the one before it, {before}." in caplog.text
    assert_equal(checkpoint_of(folder), whole, ignored=("seconds", "images_per_second", "args"))


def test_a_folder_falls_back_and_a_file_does_not(run, caplog, capsys):
    folder = run("--epochs", "2")
    (folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        run("--resume", folder / "checkpoint.pt")
    assert "checkpoint.pt is damaged or not a checkpoint" in capsys.readouterr().err
    run("--resume", folder)
    assert "Taking the one before it" in caplog.text


def test_auto_begins_anew_where_all_are_damaged_and_keeps_them(run, tmp_path, caplog):
    folder = run("--epochs", "1")
    (folder / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="too many values"):
        run("--epochs", "1", "--resume", "auto")
    assert f"There is no good one in {folder}: a new run begins." in caplog.text
    assert (tmp_path / "runs" / f"{folder.name}.1" / "checkpoint.pt").read_bytes() == b""


def test_a_checkpoint_of_format_1_goes_on_to_the_bit(run, tmp_path):
    whole = run(place="whole")
    folder = run("--keep", "3")
    new = torch.load(folder / "checkpoint.1.pt")
    names = ("model", "optimizer", "scheduler", "precision", "mask", "kinds", "random", "epoch", "metrics", "args")
    torch.save({name: new[name] for name in names} | {"format": 1}, tmp_path / "old.pt")
    assert new["epoch"] == 1
    assert_same_run(run("--resume", tmp_path / "old.pt", place="again"), whole)


# Disks


def limit_files(size):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.long
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(stop, tmp_path):
    pytest.importorskip("resource")
    stop(step=3)
    folder = run_folder(tmp_path / "runs")
    before = (folder / "checkpoint.pt").read_bytes()
    command = [sys.executable, str(FOLDER / "main.py"), *DIGITS, "--resume", "auto"]
    process = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=lambda: limit_files(200_000)
    )
    assert process.returncode == 2
    assert process.stderr.startswith("main.py: error: The checkpoint cannot be written: [Errno 27]")
    assert "The last checkpoint is kept in " in process.stderr
    assert "Make room, and go on with --resume " in process.stderr
    assert process.stderr.count("\n") == 1
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not [path for path in tmp_path.rglob(".*")]


@pytest.mark.long
def test_a_disk_too_full_for_the_log_ends_in_one_line(tmp_path):
    pytest.importorskip("resource")
    command = [sys.executable, str(FOLDER / "main.py"), *DIGITS]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=lambda: limit_files(600))
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "File too large" in process.stderr


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_became_read_only_ends_in_one_line(run, monkeypatch, capsys, error):
    replaced, replace_file = [], os.replace

    def refuse(source, place):
        if Path(place).name == "checkpoint.pt":
            replaced.append(place)
            if len(replaced) == 2:
                raise error
        replace_file(source, place)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit) as end:
        run("--keep", "1")
    assert end.value.code == 2
    line = said(capsys)
    assert error.strerror in line
    assert "The last checkpoint is kept in " in line
    place = Path(replaced[0])
    assert torch.load(place)["epoch"] == 1
    assert not list(place.parent.glob(".*"))


def test_what_killed_processes_left_is_removed(run):
    folder = run("--epochs", "1")
    (folder / ".checkpoint.pt.0123456789abcdef.scratch").write_bytes(b"half")
    run("--epochs", "1", "--resume", folder)
    assert not list(folder.glob(".*"))


# Several processes


def train_two(place, stop_at, *more):
    """Train on this process's share, the second one gets a signal in a step; return metrics, or where it stopped."""
    script = load_main()
    given = [*DIGITS, "--run-dir", str(place), "--growth", "random", *more]
    if distributed.rank() == 1 and stop_at:
        add = Progress.add

        def signalling(progress, loss):
            if progress.steps == stop_at - 1:
                signal.raise_signal(signal.SIGTERM)
            add(progress, loss)

        Progress.add = signalling
    try:
        folder = script.run(script.parse_arguments(given))
    except Stopped as stop:
        return str(stop)
    return without_times(folder.metrics)


@pytest.mark.long
@pytest.mark.parametrize("stop_at", [2, STEPS])
def test_a_signal_on_one_process_stops_all_at_the_same_step(tmp_path, stop_at):
    whole = run_processes(train_two, 2, tmp_path / "whole", None)
    first, second = run_processes(train_two, 2, tmp_path / "runs", stop_at)
    assert first == second
    assert ("in epoch 1 after step 3 of 5" if stop_at == 2 else "in the evaluation after epoch 1") in first
    assert run_processes(train_two, 2, tmp_path / "runs", None, "--resume", "auto") == whole
    one, other = (checkpoint_of(run_folder(tmp_path / place)) for place in ("runs", "whole"))
    assert_equal(one, other, ignored=("seconds", "images_per_second", "args"))
