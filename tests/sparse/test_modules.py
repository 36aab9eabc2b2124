"""Sparse modules behave as the dense ones they replace."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers_sparse import sparse_weight
from torch import nn

from sparselearning.native import library
from sparselearning.sparse import SparseConv2d, SparseLinear, available

needs_kernels = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def sparse_conv(*args, density=0.2, **kwargs):
    conv = nn.Conv2d(*args, **kwargs)
    with torch.no_grad():
        conv.weight.copy_(sparse_weight(conv.weight.shape, density))
    return conv, SparseConv2d.from_dense(conv)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"groups": 3},
    ],
)
@pytest.mark.parametrize("batch", [1, 16])
def test_conv2d_equals_dense(kwargs, batch):
    conv, layer = sparse_conv(6, 9, 3, **kwargs)
    x = torch.randn(batch, 6, 11, 8)
    torch.testing.assert_close(layer(x), conv(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer(x[0]), conv(x[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 5, 7), (40, 7)])
def test_linear_equals_dense(shape):
    linear = nn.Linear(7, 4)
    layer = SparseLinear.from_dense(linear)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)


def test_mask_says_which_weights_are_active_zeros_included():
    linear = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(linear.weight)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    layer = SparseLinear.from_dense(linear, mask)
    assert layer.column.tolist() == [0, 2, 2]
    assert layer.start.tolist() == [0, 2, 3]
    assert layer.density == 0.5
    with pytest.raises(ValueError, match=r"mask of the weight's shape \(2, 3\), got \(3, 2\)"):
        SparseLinear.from_dense(linear, mask.t())


def test_dense_and_back():
    conv, layer = sparse_conv(4, 6, 3, stride=2, padding=1)
    back = layer.to_dense()
    assert torch.equal(back.weight, conv.weight)
    assert torch.equal(back.bias, conv.bias)
    assert (back.stride, back.padding) == (conv.stride, conv.padding)
    linear = nn.Linear(4, 3)
    assert torch.equal(SparseLinear.from_dense(linear).to_dense().weight, linear.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(copied):
    _, layer = sparse_conv(4, 6, 3)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(copied(layer)(x), layer(x))


def test_state_dict_loads_into_a_layer_of_another_density():
    _, layer = sparse_conv(4, 6, 3)
    _, other = sparse_conv(4, 6, 3, density=0.6)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(other(x), layer(x))
    assert sorted(layer.state_dict()) == ["bias", "column", "start", "value"]


def test_indices_of_another_layer_are_refused_at_load():
    _, layer = sparse_conv(4, 6, 3)
    _, other = sparse_conv(2, 6, 3)
    with pytest.raises(RuntimeError, match="do not fit its shape"):
        other.load_state_dict(layer.state_dict())


def test_padding_that_kernels_lack_is_named():
    with pytest.raises(ValueError, match="reflect"):
        SparseConv2d.from_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="even kernel"):
        SparseConv2d.from_dense(nn.Conv2d(2, 2, 2, padding="same"))


@needs_kernels
def test_values_train_under_an_optimizer():
    _, layer = sparse_conv(3, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), SparseLinear.from_dense(nn.Linear(4 * 36, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(32, 3, 8, 8), torch.randint(2, (32,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_exported_layers_compute_the_same():
    _, layer = sparse_conv(3, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), SparseLinear.from_dense(nn.Linear(4 * 36, 2)))
    x = torch.randn(32, 3, 8, 8)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@needs_kernels
def test_compiled_layers_train_the_same():
    _, layer = sparse_conv(3, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), SparseLinear.from_dense(nn.Linear(4 * 36, 2)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, 3, 8, 8)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected)


@needs_kernels
def test_traced_without_gradients_a_layer_is_an_operator_still():
    layer = SparseConv2d.from_dense(nn.Conv2d(3, 4, 3), torch.rand(4, 3, 3, 3) < 0.3)
    x, other = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates tracing
        traced = torch.jit.trace(layer, x, check_trace=False)
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(traced(other), layer(other))
        assert torch.equal(exported(other), layer(other))


def test_without_kernels_layers_run_dense_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(library, "LIBRARY", None)
    conv, layer = sparse_conv(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(layer(x), conv(x))
        layer(x).sum().backward()
    assert [record.message for record in caplog.records] == [
        "SparseConv2d runs with its dense weight: built without sparse kernels."
    ]
    assert layer.value.grad.shape == layer.value.shape
