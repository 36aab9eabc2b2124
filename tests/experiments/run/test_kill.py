"""Runs killed with SIGKILL at random moments, and started again until they are done, are the uninterrupted run."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from launch import context
from script import assert_same_run, load_main, run_folder

from sparselearning.experiments.report import plots

KILLED = "--data digits --epochs 2 --batch-size 300 --growth random --checkpoint-every 1 --keep 3 --max-threads 1"


@pytest.fixture(params=[3, pytest.param(100, marks=pytest.mark.slow)])
def runs(request):
    return request.param


def train(place):
    torch.set_num_threads(1)
    main = load_main()
    plots.plot_curves = plots.plot_density = lambda *_: None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    main.main([*KILLED.split(), "--device", "cpu", "--run-dir", str(place), "--resume", "auto"])


def begin(place):
    process = context.Process(target=train, args=(place,))
    process.start()
    return process


@pytest.mark.long
def test_killed_runs_end_as_the_uninterrupted_one(tmp_path, runs):
    begin(tmp_path / "first").join()  # starts the server that the others are forked from
    started = time.monotonic()
    begin(tmp_path / "whole").join()
    seconds = time.monotonic() - started
    whole = run_folder(tmp_path / "whole")
    for number in range(runs):
        place = tmp_path / str(number)
        draw = random.Random(number)
        kills = 0
        for _ in range(100):
            process = begin(place)
            process.join(draw.uniform(0, 1.2 * 1.1**kills) * seconds)  # a machine may become slower
            if process.exitcode == 0 and kills:
                break
            kills += process.is_alive()
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
        killed = run_folder(place)
        assert process.exitcode == 0, f"{killed} was killed {kills} times"
        assert_same_run(killed, whole)
        assert not list(killed.glob(".*"))
        shutil.rmtree(place)
