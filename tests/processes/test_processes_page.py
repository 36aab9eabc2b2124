"""The loops of docs/processes.md run as they stand, on two processes."""

import os
import re
from pathlib import Path

import pytest
from launch import run

PAGE = (Path(__file__).parents[2] / "docs" / "processes.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def run_blocks(place):
    os.chdir(place)
    totals = []
    for block in BLOCKS:
        names = {}
        exec(compile(block, "processes.md", "exec"), names)
        totals.append(names["masking"].total_nonzero)
    return totals


@pytest.mark.long
def test_the_loops_of_the_page_run(tmp_path):
    assert len(BLOCKS) == 4
    assert run(run_blocks, 2, tmp_path) == [[192] * 4] * 2  # 20% of 20 * 40 + 40 * 4
