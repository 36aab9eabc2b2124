"""Freed memory that a process keeps."""

import platform
import subprocess
import sys

import pytest

from sparselearning import allocator

COUNT_FAULTS = """
import resource, torch
from sparselearning.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_the_second_use_of_memory_needs_no_pages():
    out = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert before >= 20 * (1 << 14)  # pages of 4 kB
    assert after < before / 8  # once or twice a block finds its place taken


def test_elsewhere_it_says_no(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    assert not allocator.keep_freed_memory()
