"""What processes send where they train active weights alone, and the script under torchrun."""

import os
import subprocess
import sys

import pytest
import torch
from launch import run
from script import FOLDER, load_main, metrics_of, run_folder
from torch import nn

from sparselearning import CosineDecay, Masking
from sparselearning.processes import distributed


def count_bytes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), CosineDecay(0.5, 200),
                      weights="sparse", growth_mode="gradient", redistribution_mode="nonzeros",
                      prune_every_k_steps=50)  # fmt: skip
    masking.add_module(model, density=0.1)
    network = distributed.replicate(model)
    for _ in range(100):
        masking.zero_grad()
        network(torch.randn(16, 300)).square().mean().backward()
        masking.step()
    return masking.held.bytes_per_step / masking.total_nonzero


@pytest.mark.long
def test_a_step_sends_four_bytes_for_each_active_weight_and_little_more():
    for sent in run(count_bytes, 2):
        assert 4 <= sent <= 1.1 * 4


@pytest.mark.long
def test_torchrun_trains_on_active_weights_as_one_process_does(tmp_path):
    given = "--data digits --epochs 2 --batch-size 64 --device cpu --sparse-backend cpu --density 0.1 --max-threads 1"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(FOLDER / "main.py")]
    ended = subprocess.run(
        [*command, *given.split(), "--run-dir", str(tmp_path / "runs")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    script = load_main()
    alone = script.run(script.parse_arguments([*given.split(), "--run-dir", str(tmp_path / "alone")])).metrics
    together = metrics_of(run_folder(tmp_path / "runs"))
    for found, expected in zip(together[:2], alone[:2], strict=True):
        assert found["bytes_per_step"] > 4 * found["active_weights"]
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert together[-1]["test_accuracy"] == pytest.approx(alone[-1]["test_accuracy"], abs=0.03)
