"""torch's layers keep the memory order between sparse layers, and compute the same."""

import copy

import pytest
import torch
from torch import nn

from sparselearning.sparse import available
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.memory_order import is_turned, to_batch_last

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.MaxPool2d(2, ceil_mode=True)]
)
def test_outputs_and_gradients_are_those_of_torch(layer, training):
    keeping = copy.deepcopy(layer).train(training)
    layer.train(training)
    keep_order(keeping)
    x = torch.randn(16, 5, 7, 9)
    results = []
    for module, given in ((layer, x), (keeping, to_batch_last(x)), (keeping, x[:3])):
        given = given.detach().requires_grad_()
        y = module(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert is_turned(results[1][0])
    assert not is_turned(results[2][0])
    forget_order(keeping)
    assert type(keeping) is type(layer)
