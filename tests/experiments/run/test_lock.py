"""The lock of a run folder: one run at a time, whoever ended and however."""

import errno
import json
import os
import signal
import socket

import pytest
from jpegs import write_folder
from launch import context
from launch import run as run_processes
from script import draw_nothing, load_main, metrics_of, run_folder, small_network

from sparselearning.experiments.run import lock
from sparselearning.experiments.run.lock import FolderLock, Locked, locked
from sparselearning.experiments.run.together import said_by_first
from sparselearning.experiments.run.training import Progress

SCRIPTS = {folder: load_main(folder) for folder in ("mnist_cifar", "imagenet")}
SMALL = "--epochs 1 --device cpu --max-threads 1"
GIVEN = {
    "mnist_cifar": f"--data digits --batch-size 300 {SMALL}",
    "imagenet": f"photographs --arch resnet18 --image-size 32 --batch-size 8 --workers 0 {SMALL}",
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "runs" / "run" / lock.NAME


def written(file, **holder):
    """Write the lock of another process; return what is in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(lock._this_process() | holder)
    file.write_text(text)
    return text


def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


# Through the scripts


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("more", [(), ("--resume", "auto")])
def test_a_second_run_is_refused_while_the_first_lives(script, more, tmp_path, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    if script == "imagenet":
        write_folder(tmp_path / "photographs")
        monkeypatch.setattr(SCRIPTS[script], "build_model", small_network)
    main, add, ended = SCRIPTS[script].main, Progress.add, []

    def add_and_start_again(progress, loss):
        add(progress, loss)
        if not ended:
            with pytest.raises(SystemExit) as end:
                main([*GIVEN[script].split(), *more])
            ended.append((end.value.code, capsys.readouterr().err.splitlines()[-1]))

    monkeypatch.setattr(Progress, "add", add_and_start_again)
    main([*GIVEN[script].split(), *more])
    ((status, line),) = ended
    assert status == 2
    folder = run_folder("runs")
    assert line.startswith(f"main.py: error: The run folder {folder} is in use: process {os.getpid()} on ")
    assert socket.gethostname() in line
    assert line.endswith(f"Wait for its end, or choose another --run-dir or --seed; if it runs no longer, remove "
                         f"{folder / lock.NAME}.")  # fmt: skip
    assert metrics_of(folder)[0]["epoch"] == 1
    assert not (folder / lock.NAME).exists()


def test_a_run_that_fails_leaves_neither_lock_nor_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, more in (("mnist_cifar", "--resume nowhere.pt --sparse-init resume"), ("imagenet", "")):
        with pytest.raises(SystemExit) as end:
            SCRIPTS[script].main([*GIVEN[script].split(), *more.split()])
        assert end.value.code == 2
        assert os.listdir() == []


def test_a_run_put_aside_is_locked_no_more_and_the_new_one_is(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    given = [*GIVEN["mnist_cifar"].split(), "--run-dir", str(tmp_path)]
    first = SCRIPTS["mnist_cifar"].run(SCRIPTS["mnist_cifar"].parse_arguments(given)).path
    add, seen = Progress.add, []

    def look(progress, loss):
        seen.append([path.parent.name for path in tmp_path.rglob(lock.NAME)])
        add(progress, loss)

    monkeypatch.setattr(Progress, "add", look)
    SCRIPTS["mnist_cifar"].main(given)
    assert seen == [[first.name]] * 5
    assert {path.name for path in tmp_path.iterdir()} == {first.name, f"{first.name}.1"}
    assert not list(tmp_path.rglob(lock.NAME))


def start_run(place):
    main = load_main()
    try:
        main.run(main.parse_arguments([*GIVEN["mnist_cifar"].split(), "--run-dir", str(place)]))
    except Locked as error:
        return str(error), said_by_first(error)


def test_all_processes_are_told_and_one_says_it(tmp_path):
    args = SCRIPTS["mnist_cifar"].parse_arguments([*GIVEN["mnist_cifar"].split(), "--run-dir", str(tmp_path)])
    with locked(SCRIPTS["mnist_cifar"].place(args)):
        first, second = run_processes(start_run, 2, tmp_path)
    assert first[0] == second[0]
    assert f"process {os.getpid()} on " in first[0]
    assert (first[1], second[1]) == (False, True)


# Processes that ended


def hold(folder, pipe, fork):
    FolderLock(folder)
    child = os.fork() if fork else 0
    if fork and not child:
        signal.pause()
    pipe.send((os.getpid(), child))
    signal.pause()


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("fork", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(file, monkeypatch, caplog, flock, fork):
    """Also while a process that it had forked, as a loader's worker, still holds its flock."""
    caplog.set_level("INFO")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(file.parent, theirs, fork))
    holder.start()
    pid, child = ours.recv()
    try:
        if not flock:
            without_flock(monkeypatch)
        with pytest.raises(Locked, match=rf"process {pid} on {socket.gethostname()} has written there since 2"):
            FolderLock(file.parent)
        os.kill(pid, signal.SIGKILL)
        while lock._began(pid) is not None:
            pass
        FolderLock(file.parent).release()
        assert f"Process {pid} on {socket.gethostname()} has left its lock" in caplog.text
    finally:
        holder.kill()
        holder.join()
        if child:
            os.kill(child, signal.SIGKILL)
    assert not file.parent.exists() or not any(file.parent.iterdir())


@pytest.mark.parametrize(
    "holder",
    [
        dict(began=1),  # the number of the process has been given to another one
        dict(pid=2**22 + 1),
        dict(host="elsewhere"),
        dict(machine=["another", "pid:[1]"]),
        dict(pid="none", began=None),
    ],
)
def test_a_free_flock_says_that_the_holder_has_ended(file, holder):
    written(file, **holder)
    with locked(file.parent):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": "elsewhere"}', "\0" * 9])
def test_a_lock_that_was_not_written_whole_is_taken_over(file, text):
    written(file)
    file.write_text(text)
    with locked(file.parent):
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("holder", "stale"),
    [
        (dict(pid=2**22 + 1), True),
        (dict(began=1), True),
        (dict(began=None), False),
        (dict(began=None, pid=2**22 + 1), True),
        (dict(host="elsewhere"), False),
        (dict(machine=["another", "pid:[1]"]), False),
        (dict(), False),
    ],
)
def test_without_flock_the_file_decides(file, monkeypatch, holder, stale):
    without_flock(monkeypatch)
    text = written(file, **holder)
    if stale:
        with locked(file.parent):
            assert json.loads(file.read_text())["pid"] == os.getpid()
        assert not file.exists()
        return
    with pytest.raises(Locked, match=rf"if it runs no longer, remove {file}\."), locked(file.parent):
        pass
    assert file.read_text() == text


def test_a_lock_replaced_at_the_last_moment_stays(file, monkeypatch):
    """Two processes find the lock of a third one, which has ended: the slower one does not remove the faster one's."""
    written(file, pid=2**22 + 1)
    read, faster = lock._read, []

    def read_and_be_overtaken(opened):
        monkeypatch.setattr(lock, "_read", read)
        found = read(opened)
        file.unlink()
        faster.append(FolderLock(file.parent))
        return found

    monkeypatch.setattr(lock, "_read", read_and_be_overtaken)
    with pytest.raises(Locked, match=f"process {os.getpid()} on "):
        FolderLock(file.parent)
    assert json.loads(file.read_text())["pid"] == os.getpid()
    faster[0].release()


# Places


def test_folders_made_for_the_lock_go_with_it_unless_they_are_used(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.NAME).is_file()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c"):
        pass
    assert (tmp_path / "c").is_dir(), "it was there before"


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run folder .* cannot be written: .* Choose another place with --run-dir"):
        FolderLock(tmp_path / "file" / "run")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"run folder .* cannot be written: .*No space left on device\. Choose another"):
        FolderLock(tmp_path / "a" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
