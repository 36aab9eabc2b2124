"""The kernels touch no memory that is not theirs, and do nothing undefined."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("sanitize.cpp")
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(*flags):
    subprocess.run(["g++", "-std=c++17", "-Wno-psabi", SOURCE, *flags], check=True)


@pytest.mark.long
@needs_compiler
def test_what_the_sanitizers_run_fits_the_kernels():
    """The build with sanitizers takes minutes and is left to the slow tests; this one notices a changed interface."""
    build("-fsyntax-only")


@pytest.mark.slow
@needs_compiler
def test_kernels_pass_address_and_undefined_behaviour_sanitizers(tmp_path):
    program = tmp_path / "sanitize"
    build(*SANITIZERS, "-o", program)
    run = subprocess.run([program, "100", "100000"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
