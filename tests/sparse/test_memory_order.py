"""Activations are turned from one memory order to the other, and stay the same."""

import pytest
import torch

from sparselearning.sparse import available
from sparselearning.sparse.memory_order import is_turned, to_batch_first, to_batch_last

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def test_turning_there_and_back():
    x = torch.randn(20, 3, 5, 4)
    turned = to_batch_last(x)
    assert is_turned(turned)
    assert torch.equal(turned, x)
    assert torch.equal(to_batch_first(turned), x)
    assert to_batch_first(turned).is_contiguous()
