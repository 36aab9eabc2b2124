"""Dense convolutions of single pixels compute what torch's do, and give images as sparse layers do."""

import pytest
import torch
from helpers import needs_torch
from torch import nn

from sparselearning.sparse import SparseConv2d, available, load, pointwise, save
from sparselearning.sparse.memory_order import is_turned, to_batch_last
from sparselearning.sparse.pointwise import PointwiseConv2d

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("settings", [{}, dict(bias=False), dict(stride=2), dict(stride=(1, 3), padding="valid")])
@torch.no_grad()
def test_outputs_are_those_of_torch_in_the_order_of_sparse_layers(settings, relu, dtype):
    layer = nn.Conv2d(5, 7, 1, **settings).to(dtype)
    module = PointwiseConv2d.of(layer, relu)
    assert module.weight is layer.weight
    for images, turned in ((8, True), (3, False), (1, False), (16, True)):
        x = torch.randn(images, 5, 7, 9, dtype=dtype)
        expected = layer(x).relu() if relu else layer(x)
        for given in (x, to_batch_last(x), x.to(memory_format=torch.channels_last)):
            y = module(given)
            torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
            assert is_turned(y) == (turned or is_turned(given))
    torch.testing.assert_close(module(x[0]), layer(x[0]).relu() if relu else layer(x[0]), atol=1e-5, rtol=1e-5)
    assert module(x[:0]).shape == layer(x[:0]).shape


@pytest.mark.parametrize("turned", [True, False])
def test_gradients_are_those_of_torch(turned):
    layer = nn.Conv2d(5, 7, 1, stride=2)
    x = torch.randn(8, 5, 6, 6)
    results = []
    for module, given in ((layer, x), (PointwiseConv2d.of(layer, False), to_batch_last(x) if turned else x)):
        given = given.detach().requires_grad_()
        y = module(given)
        results.append((y, *torch.autograd.grad(y.square().sum(), (given, *layer.parameters()))))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-5)


@needs_torch(2, 8, "a dynamic batch of convolutions")
def test_a_model_that_holds_one_is_saved_for_any_batch(tmp_path):
    sparse = SparseConv2d.from_dense(nn.Conv2d(3, 5, 3))
    model = nn.Sequential(sparse, PointwiseConv2d.of(nn.Conv2d(5, 7, 1, stride=2), True), nn.Flatten()).eval()
    save(model, tmp_path / "file", torch.randn(8, 3, 9, 9))
    serve = load(tmp_path / "file")
    for images in (1, 8, 13, 16):
        x = torch.randn(images, 3, 9, 9)
        with torch.no_grad():
            torch.testing.assert_close(serve(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(pointwise.BY_ONEDNN is None, reason="torch without oneDNN's product")
def test_the_product_is_onednns_where_nothing_else_is_asked_for(monkeypatch):
    calls = []
    found = pointwise.BY_ONEDNN
    monkeypatch.setattr(pointwise, "BY_ONEDNN", lambda *given: calls.append(given) or found(*given))
    layer = nn.Conv2d(5, 7, 1)
    module = PointwiseConv2d.of(layer, False)
    with torch.no_grad():
        for x in (torch.randn(1, 5, 6, 6), torch.randn(3, 5, 6, 6).to(memory_format=torch.channels_last)):
            y = module(x)
            assert y.is_contiguous(memory_format=torch.channels_last) == (len(x) == 3)
            torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-5)
        assert len(calls) == 2
        with torch.autocast("cpu"):
            assert module(x).dtype is torch.bfloat16
        with monkeypatch.context() as off:
            off.setattr(torch.backends.mkldnn, "enabled", False)
            module(x)
        module.double()(x.double())
    x = to_batch_last(x).requires_grad_()
    assert module.float()(x).requires_grad
    assert len(calls) == 2


def test_a_wrong_number_of_channels_gets_the_error_of_torch():
    layer = nn.Conv2d(5, 7, 1)
    for given in (torch.randn(8, 4, 3, 3), to_batch_last(torch.randn(8, 4, 3, 3))):
        with pytest.raises(RuntimeError, match="to have 5 channels"):
            PointwiseConv2d.of(layer, False)(given)


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 4), Own(4, 4, 1)],
)
def test_others_are_none(layer):
    assert PointwiseConv2d.of(layer, False) is None
