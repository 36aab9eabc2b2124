"""A run that is stopped or killed again and again, on one process and on two in turn, ends as if it had not been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from script import FOLDER, assert_equal, checkpoint_of, metrics_of, run_folder

from sparselearning.sparse import available

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SCRIPT = str(FOLDER / "main.py")
RUN = "--data digits --growth random --checkpoint-every 3 --keep 3 --device cpu --max-threads 1 --resume auto"
STEPS = 13  # of an epoch
ACTIVE = 13_310
PATIENCE = 600  # seconds, for a test that hangs
# Of torchrun, of a run that was stopped, and of one that was killed: before it handles signals, SIGTERM kills it too.
STATUSES = (1, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)


class Attempt:
    """The processes of a run, begun or gone on with."""

    def __init__(self, place, processes, epochs, more=()):
        command = [*(TORCHRUN if processes > 1 else [sys.executable]), SCRIPT, *RUN.split(), *more]
        command += ["--epochs", str(epochs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.several = processes > 1
        self.place = place
        self.seen = self.last_write()
        self.errors = (place.parent / "errors.txt").open("w+")
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(place)], env=environment, stdout=subprocess.DEVNULL, stderr=self.errors
        )

    def last_write(self):
        with suppress(FileNotFoundError):  # it is being replaced
            return max([path.stat().st_mtime_ns for path in self.place.glob("*/checkpoint.pt")], default=0)
        return 0

    def trains(self):
        """Wait until it has written a checkpoint; tell whether it did before it ended."""
        until = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < until:
            if self.last_write() > self.seen:
                return True
            time.sleep(0.01)
        return False

    def workers(self):
        """The processes that torchrun started."""
        pid = self.process.pid
        with suppress(FileNotFoundError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    def send(self, number, draw):
        """Send a signal to the run, or to one of its processes; SIGKILL kills that one or all."""
        pids = [self.process.pid]
        if self.several and draw.random() < 0.5:
            pids = [draw.choice(self.workers() or pids)]
        elif self.several and number == signal.SIGKILL:  # those that torchrun started would train on without it
            send(self.process.pid, signal.SIGSTOP)  # so that it starts no more
            pids += self.workers()
        for pid in pids:
            send(pid, number)

    def end(self):
        """Wait for its end; return its status and its errors other than a lost process."""
        with self.errors:
            try:
                status = self.process.wait(PATIENCE)
            finally:
                self.process.kill()
            self.errors.seek(0)
            said = re.findall(r"main\.py: error: .*", self.errors.read())
        return status, [line for line in said if "lost another process" not in line]


def send(pid, number):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def finish(place, processes, epochs):
    """Go on to the end, and check what the run left."""
    status, errors = Attempt(place, processes, epochs).end()
    assert (status, errors) == (0, [])
    folder = run_folder(place)
    *records, test = metrics_of(folder)
    assert [record["epoch"] for record in records] == [*range(1, epochs + 1)]
    assert [record["steps"] for record in records] == [*range(STEPS, STEPS * epochs + 1, STEPS)]
    assert {record["active_weights"] for record in records} == {ACTIVE}
    assert test["test_total"] == 359
    saved = checkpoint_of(folder)
    layers = saved["mask"]["layers"]
    assert sum(int(layer["mask"].sum()) for layer in layers.values()) == ACTIVE
    assert not any(saved["model"][name][~layer["mask"]].any() for name, layer in layers.items())
    left = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint")}
    assert left == {"args.json", "curves.png", "density.png", "log.txt", "metrics.jsonl"}
    return records


@pytest.mark.slow
def test_torchrun_ends_a_stopped_run_with_1_and_one_process_goes_on(tmp_path):
    place = tmp_path / "runs"
    attempt = Attempt(place, 2, epochs=8)
    assert attempt.trains()
    attempt.process.send_signal(signal.SIGTERM)
    assert attempt.end() == (1, []), "of torchrun; its processes end with 143"
    said = (tmp_path / "errors.txt").read_text()
    assert said.count("main.py: stopped by SIGTERM; ") == 1, "one process says it"
    assert checkpoint_of(run_folder(place))["epoch"] < 8
    finish(place, 1, epochs=8)


@pytest.mark.slow
def test_fifty_kills_on_one_process_and_two_in_turn_leave_no_trace(tmp_path):
    place, draw, epochs, kills = tmp_path / "runs", random.Random(0), 200, 0
    attempts = 0
    while kills < 50:
        attempts += 1
        assert attempts < 100
        attempt = Attempt(place, 1 + attempts % 2, epochs)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 5))  # perhaps before it trains
        elif attempt.trains():
            time.sleep(draw.uniform(0, 0.5))
        if attempt.process.poll() is None:
            attempt.send(draw.choice([signal.SIGKILL, signal.SIGTERM]), draw)
            kills += 1
        status, errors = attempt.end()
        assert status in STATUSES or (status == 0 and kills > 40), f"attempt {attempts} ended with {status}"
        assert errors == []
    finish(place, 2, epochs)


@pytest.mark.slow
@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_a_hundred_kills_of_a_run_on_active_weights_leave_no_trace(tmp_path):
    """With the gradients of inactive weights that are observed before an update."""
    more = ["--weights", "sparse", "--growth", "gradient", "--prune-every-k-steps", "7"]
    draw, epochs, kills = random.Random(0), 400, 0
    while kills < 100:
        attempt = Attempt(tmp_path / "killed", 1, epochs, more)
        if attempt.trains():
            time.sleep(draw.uniform(0, 0.2))
        if attempt.process.poll() is None:
            attempt.send(signal.SIGKILL, draw)
            kills += 1
        status, errors = attempt.end()
        assert status in STATUSES or (status == 0 and kills > 80), f"after {kills} kills it ended with {status}"
        assert errors == []
    for place in ("killed", "whole"):
        assert Attempt(tmp_path / place, 1, epochs, more).end() == (0, [])
    killed, whole = (checkpoint_of(run_folder(tmp_path / place)) for place in ("killed", "whole"))
    for part in ("model", "optimizer", "mask"):
        assert_equal(killed[part], whole[part])
