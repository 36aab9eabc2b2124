"""language/demo.py: a table, a picture and two texts; and the bytes that its runs hold."""

import re

import pytest
import torch
from helpers import masked, train
from small_text import type_command

from sparselearning import checkpoint
from sparselearning.experiments.report.held_bytes import bytes_held
from sparselearning.models.gpt import GPT
from sparselearning.sparse import available


@pytest.mark.long
@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_the_demo_trains_both_models(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    done = type_command(
        "text.txt", "--steps", 2, "--run-dir", "here", "--prompt", "to", cwd=tmp_path, program="demo.py"
    )
    assert done.returncode == 0, done.stderr
    rows = {label: re.search(rf"(?m)^{label} .*", done.stdout)[0].split() for label in ("dense", "sparse")}
    assert (rows["dense"][3], rows["sparse"][3]) == ("1,572,864", "209,716")
    held = {label: float(row[-1]) for label, row in rows.items()}
    assert held["dense"] == pytest.approx(16 * (1_572_864 + 81_920 + 1_280) / 1e6, rel=0.01)
    assert held["sparse"] == pytest.approx((20 * 209_716 + 16 * (81_920 + 1_280)) / 1e6, rel=0.02)
    assert len(re.findall(r"model writes:\nto", done.stdout)) == 2
    assert (tmp_path / "here" / "language-demo.png").stat().st_size > 5000


def test_bytes_held_count_a_tied_weight_once_and_masks(tmp_path):
    model = GPT(50, layers=1, width=8, heads=2, context=4)
    optimizer = torch.optim.Adam(model.parameters())
    masking = masked(model, optimizer)
    train(model, masking, inputs=torch.ones(1, 4, dtype=torch.int64))
    checkpoint.save(tmp_path / "checkpoint.pt", model=model, optimizer=optimizer, mask=masking)
    parameters = [*model.parameters()]
    numbers = sum(weight.numel() for weight in parameters)
    masks = sum(mask.numel() for mask in masking.masks.values())
    assert bytes_held(tmp_path / "checkpoint.pt") == 16 * numbers + masks + 4 * len(parameters)  # Adam counts steps
