"""Freed memory that a process keeps."""

import os
import platform
import subprocess
import sys

import pytest

from sparselearning.native import allocator
from sparselearning.sparse import available

COUNT_FAULTS = """
import resource, torch
from sparselearning.native import allocator
from sparselearning.sparse import SparseLinear

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
{}
faults()
print(before, faults())
"""
BY_REQUEST = "assert allocator.keep_freed_memory()"
BY_A_SPARSE_LAYER = "SparseLinear.from_dense(torch.nn.Linear(8, 8))(torch.ones(16, 8))"

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")


def count_faults(keep, **environment):
    """Return the page faults of the same work before and after `keep` was run."""
    ours = (*allocator.CHOICES, "GLIBC_TUNABLES")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", COUNT_FAULTS.format(keep)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | environment)
    return map(int, run.stdout.split())


@pytest.mark.long
@needs_glibc
@pytest.mark.parametrize(
    "keep",
    [
        BY_REQUEST,
        pytest.param(BY_A_SPARSE_LAYER, marks=pytest.mark.skipif(not available(), reason="built without kernels")),
    ],
)
def test_the_second_use_of_memory_needs_no_pages(keep):
    before, after = count_faults(keep)
    assert before >= 20 * (1 << 14)  # pages of 4 kB
    assert after < before / 8  # once or twice a block finds its place taken


@pytest.mark.long
@needs_glibc
def test_what_the_environment_says_stays():
    before, after = count_faults(BY_A_SPARSE_LAYER, MALLOC_TRIM_THRESHOLD_="131072")
    assert after >= 20 * (1 << 14) <= before


def test_elsewhere_it_says_no(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    assert not allocator.keep_freed_memory()


def test_it_says_no_where_the_environment_has_chosen(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize("number", [-1, 2**31, 2**70])
def test_it_refuses_numbers_that_mallopt_does_not_take(number):
    with pytest.raises(ValueError, match="Expected a number of bytes"):
        allocator.keep_freed_memory(number)


GIVE = """
import torch
from sparselearning.native import allocator

def resident():
    lines = open("/proc/self/status").read().split("VmRSS:")[1]
    return int(lines.split()[0]) // 1024

def use():
    blocks = [torch.ones(1 << 20) for _ in range(50)]  # 200 MB
    last = torch.ones(1 << 20)  # on top of them
    del blocks
    return last

assert allocator.keep_freed_memory()
before = resident()
allocator.lay_large_blocks_apart()
last = use()
inside = resident()
allocator.lay_large_blocks_apart(False)
last = use()
kept = resident()
allocator.give_freed_memory()
print(kept - before, resident() - before, inside - before)
"""


@pytest.mark.long
@needs_glibc
def test_freed_memory_is_given_back_when_asked():
    run = subprocess.run([sys.executable, "-c", GIVE], capture_output=True, text=True, check=True)
    kept, given, inside = map(int, run.stdout.split())
    assert kept > 150 > 50 > given
    assert inside < 50


def test_without_kept_memory_nothing_is_given(monkeypatch):
    monkeypatch.setattr(allocator, "_limits", [])
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    allocator.give_freed_memory()
    allocator.lay_large_blocks_apart()
