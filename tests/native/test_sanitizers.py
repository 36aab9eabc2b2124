"""The kernels touch no memory that is not theirs, and do nothing undefined."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("sanitize.cpp")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_pass_address_and_undefined_behaviour_sanitizers(tmp_path):
    flags = ["-std=c++17", "-g", "-O1", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = tmp_path / "sanitize"
    subprocess.run(["g++", *flags, SOURCE, "-o", program], check=True)
    run = subprocess.run([program, "100", "100000"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
