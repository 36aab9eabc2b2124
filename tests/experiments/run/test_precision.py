"""What a step computes in, the loss scale in a checkpoint, and where Apex is found."""

import sys
import types

import pytest
import torch
from torch import nn

from sparselearning.experiments.run.precision import Precision, find_apex

CPU = torch.device("cpu")


@pytest.mark.parametrize(("amp", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_decides_what_a_layer_computes_in(amp, dtype):
    with Precision(amp, CPU).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_precision_keeps_the_loss_scale():
    precision, other = Precision("fp16", CPU), Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    other.load_state_dict(precision.state_dict())
    assert other.scaler.get_scale() == 512.0


def test_apex_is_absent_where_it_has_no_such_optimizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.fp16_utils", types.ModuleType("apex.fp16_utils"))
    assert find_apex() is None
