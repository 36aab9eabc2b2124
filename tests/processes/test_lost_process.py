"""Of two processes one dies, or comes with other masks: the other ends with one line, soon."""

import os
import re
import signal
import socket
import time

import pytest
import torch
from helpers import masked, mlp
from launch import context
from launch import run as run_processes
from script import load_main

from sparselearning.experiments.run.training import Progress
from sparselearning.processes import distributed


def train(rank, port, place, dies_at):
    """Run mnist_cifar/main.py as torchrun would start it; the second process dies in a step."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ |= dict(WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT), number)
    if rank:
        add = Progress.add

        def die(progress, loss):
            if progress.steps == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            add(progress, loss)

        Progress.add = die
    given = "--data digits --epochs 20 --batch-size 300 --max-threads 1 --device cpu --run-dir"
    load_main().main([*given.split(), str(place / "runs")])


def test_a_process_that_dies_ends_the_other_with_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=train, args=(rank, port, tmp_path, 3)) for rank in range(2)]
    for process in processes:
        process.start()
    processes[1].join(200)
    assert processes[1].exitcode == -signal.SIGKILL
    died = time.monotonic()
    processes[0].join(60)
    assert time.monotonic() - died < 60
    assert processes[0].exitcode == 1
    said = (tmp_path / "err.0").read_text()
    assert re.fullmatch(r"main\.py: error: Process 0 lost another process, which has died or hangs: .*\n", said)


def join_with_other_masks():
    masking = masked(mlp(8, 8), density=0.5)
    state = masking.state_dict()
    if distributed.rank() == 1:
        state["layers"]["fc1.weight"]["mask"] = ~state["layers"]["fc1.weight"]["mask"]
    with pytest.raises(distributed.ProcessError, match="The masks of rank 1 differ from those of rank 0"):
        masking.load_state_dict(state)
    with pytest.raises(distributed.ProcessError, match="The masks of rank 1 differ"):
        masking.check()


def test_a_process_that_joins_with_other_masks_is_noticed():
    run_processes(join_with_other_masks, 2)


def test_other_errors_keep_their_type():
    with pytest.raises(RuntimeError, match=r"^gloo$") as error, distributed.noticing_losses():
        raise RuntimeError("gloo")
    assert type(error.value) is RuntimeError
