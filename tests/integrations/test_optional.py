"""Trainers are imported when they are used, and no earlier; every extra names them."""

import re
import subprocess
import sys
from collections import UserDict
from pathlib import Path

import pytest
import torch
from helpers import mlp

from sparselearning.integrations.shared import count_flops

ROOT = Path(__file__).parents[2]
TRAINERS = ["accelerate", "lightning", "transformers"]


@pytest.mark.long
def test_the_library_imports_no_trainer():
    code = f"import sys, sparselearning.core, sparselearning.sparse; assert not {{*{TRAINERS}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_integration_is_short_and_needs_its_trainer_alone(trainer):
    text = (ROOT / "sparselearning" / "integrations" / f"{trainer}.py").read_text()
    assert text.count("\n") < 100
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names <= {trainer, "sparselearning", "torch"}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_is_an_extra_and_has_a_page(trainer):
    assert f'"{trainer}"' in (ROOT / "setup.py").read_text()
    page = (ROOT / "docs" / f"{'trainer' if trainer == 'transformers' else trainer}.md").read_text()
    assert f'"sparselearning[{trainer}]"' in page


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"input": x}, lambda x: UserDict(input=x)])
def test_flops_are_counted_on_inputs_of_any_form(wrap):
    model = mlp(20, 30, 10).double()  # an example is given the dtype and the device of the weights
    state = torch.get_rng_state()
    assert count_flops(model, wrap(torch.zeros(1, 20))).dense == 2 * (20 * 30 + 30 * 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert count_flops(model, None) is None
