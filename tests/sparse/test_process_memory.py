"""The memory of a process that trains active weights alone, as the operating system sees it."""

import subprocess
import sys

import pytest
import torch

from sparselearning import Masking
from tests.native.test_allocator import needs_glibc

MEASURE = """
import sys
sys.path.insert(0, "benchmarks")
import memory
found = memory.measure(kind="sparse", width=4096, threads=1, density={density}, start="meta")
print(found["steady"], found["peak"])
"""


@pytest.mark.long
@needs_glibc
@pytest.mark.parametrize(
    ("density", "steady", "peak"), [(0.05, 2.0, 3.0), pytest.param(0.01, 0.6, 1.6, marks=pytest.mark.slow)]
)
def test_memory_follows_the_active_weights(density, steady, peak):
    command = [sys.executable, "-c", MEASURE.format(density=density)]
    found = []
    for _ in range(3):  # the system counts pages late while other processes take memory
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(tuple(float(number) for number in run.stdout.split()))
        if found[-1][0] <= steady and found[-1][1] <= peak:
            return
    pytest.fail(f"expected at most {steady} and {peak} bytes per weight, got {found}")


def test_passes_weigh_what_layers_put_out():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None, growth_mode="random", redistribution_mode="none", weights="sparse")
    masking.add_module(model, density=0.05)
    for rows, expected in [(8, True), (4096, False), (8, True)]:
        model(torch.randn(rows, 512)).sum().backward()
        optimizer.step()
        assert masking.held.outweighs_passes is expected


def test_what_a_compiled_pass_weighs_is_unknown():
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None, growth_mode="random", redistribution_mode="none", weights="sparse")
    masking.add_module(model, density=0.05)
    assert not masking.held.outweighs_passes
