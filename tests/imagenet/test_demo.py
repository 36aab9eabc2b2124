"""imagenet/demo.py: from generated pictures to a table and a picture."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "imagenet" / "demo.py"


@pytest.mark.long
def test_the_demo_trains_both_networks_on_generated_pictures(tmp_path):
    command = [sys.executable, str(DEMO), "--epochs", "1", "--pictures", "4", "--image-size", "16"]
    done = subprocess.run([*command, "--run-dir", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"sparse +0\.20 +2,234,406 ", done.stdout)
    assert re.search(r"dense +1\.00 +11,181,642 ", done.stdout)
    assert (tmp_path / "imagenet-demo.png").exists()
