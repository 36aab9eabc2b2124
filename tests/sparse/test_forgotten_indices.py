"""Converted models hold no indices that only gradients read, and still give the gradients."""

import copy

import pytest
import torch
from helpers_conversion import sparsify
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, available, convert

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def layers():
    """Return sparse layers, and inputs for them."""
    torch.manual_seed(0)
    strided = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
    for layer, shape in ((nn.Linear(9, 7), (9,)), (nn.Conv2d(3, 5, 3), (3, 8, 8)), (strided, (4, 9, 9))):
        kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
        yield kind.from_dense(sparsify(layer, 0.4)), shape


def gradients(layer, x, call=None):
    y = layer(x) if call is None else call(x)
    return torch.autograd.grad(y.square().sum(), [x, layer.value, layer.bias])


@pytest.mark.parametrize("batch", [0, 1, 5, 16])
def test_gradients_are_the_same_without_the_turned_indices(batch):
    for layer, shape in layers():
        x = torch.randn(batch, *shape, requires_grad=True)
        expected = gradients(layer, x)
        layer.serve()
        assert len(layer.t_column) == len(layer.t_order) == 0
        assert all(map(torch.equal, gradients(layer, x), expected))
        twice = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
        torch.testing.assert_close(twice.detach(), expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_gradients_without_the_turned_indices():
    for layer, shape in layers():
        x = torch.randn(5, *shape, requires_grad=True)
        expected = gradients(layer, x)
        layer.serve()
        torch.testing.assert_close(gradients(layer, x, torch.compile(layer, backend="aot_eager")), expected)


def test_a_loaded_state_leaves_them_out_only_where_they_were():
    for layer, shape in layers():
        whole, state = copy.deepcopy(layer), layer.state_dict()
        layer.serve()
        for each in (layer, whole):
            each.load_state_dict(state)
        assert len(layer.t_column) == 0
        assert len(whole.t_column) == len(whole.value)
        x = torch.randn(3, *shape, requires_grad=True)
        assert all(map(torch.equal, gradients(layer, x), gradients(whole, x)))


def test_indices_of_other_lengths_are_refused():
    for layer, shape in layers():
        layer.t_column = layer.t_column[:0]
        with pytest.raises(ValueError, match="one column for each value"):
            layer(torch.randn(0, *shape))


@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_takes_eight_bytes_for_a_weight():
    model = sparsify(nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 500)), 0.1)
    fast, _ = convert(model, torch.randn(2, 16, 8, 8))
    active = sum(int((layer.weight != 0).sum()) for layer in (model[0], model[3]))
    assert sum(tensor.nbytes for tensor in [*fast.parameters(), *fast.buffers()]) < 8.6 * active
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    found, expected = (torch.autograd.grad(each(x).sum(), x)[0] for each in (fast, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
