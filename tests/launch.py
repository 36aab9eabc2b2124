"""Run a function in several processes that communicate through Gloo."""

import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import TORCH

# Starts from a server that has imported torch once: a fork of this process would share its threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "sklearn.datasets", "sparselearning", "sparselearning.experiments.report.plots"]
)

# What torch itself raises: 2.6 for any module that FSDP2 has divided, 2.7 for one that is divided and replicated.
FSDP2_LACKS_CPU = ("'Stream' object has no attribute 'record_event'", "assert all_reduce_event is not None")


def run(function, processes, *arguments):
    """Call `function(*arguments)` in each process, with the same seed; return the results by rank.

    Raises:
        RuntimeError: with the traceback, if it raised in one of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(processes)]
        started = [
            context.Process(target=_work, args=(function, arguments, rank, processes, folder, pipe))
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(started, pipes, strict=True):
            process.start()
            theirs.close()  # so that its end is seen when the process ends
        try:
            answers = [_answer(ours) for ours, _ in pipes]
        finally:
            for process in started:
                process.join(5)
                process.kill()
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
    if TORCH < (2, 8) and any(sign in error for error in errors for sign in FSDP2_LACKS_CPU):
        pytest.skip("FSDP2 on a CPU needs torch 2.8")
    if errors:
        raise RuntimeError("\n".join(errors))
    return [torch.load(io.BytesIO(result), weights_only=False) for _, result in answers]


def set_torchrun_variables():
    """Set what torchrun sets; Accelerate reads it, though the process group is there already."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def _answer(pipe):
    try:
        return pipe.recv() if pipe.poll(300) else ("silent for 300 s", None)
    except EOFError:
        return "ended without an answer", None


def _work(function, arguments, rank, processes, folder, pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        store = dist.FileStore(os.path.join(folder, "store"), processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=300))
        result = io.BytesIO()  # not as a tensor in shared memory, which ends with this process
        torch.save(function(*arguments), result)
        pipe.send((None, result.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
