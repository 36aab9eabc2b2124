"""Max-pooling with the ReLU and the sparse convolution before it gives the numbers of torch's layers, one by one."""

import copy
import functools
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

from sparselearning import Masking, models
from sparselearning.sparse import available
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.memory_order import is_turned, to_batch_last
from sparselearning.sparse.pooling import MaxPool, PooledConv2d
from sparselearning.sparse.rows import Row

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def images(*shape, dtype=torch.float32, turned=True):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    return (to_batch_last(x) if turned else x).requires_grad_()


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or dict(atol=1e-4, rtol=1e-4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("size", [2, (2, 3), (3, 1), 1, (15, 17)])
@pytest.mark.parametrize("batch", [8, 13, 16, 100])
def test_pooling_is_exact(batch, size, relu, dtype):
    pool = nn.MaxPool2d(size)
    row = nn.Sequential(nn.ReLU(), pool) if relu else nn.Sequential(pool)
    kept = copy.deepcopy(row)
    keep_order(kept)
    x = images(batch, 3, 15, 17, dtype=dtype)
    assert kept[-1].has_kernel(x)
    expected, y = row(x), kept(x)
    assert is_turned(y) or y.shape[2:] == (1, 1)
    same(y, expected, atol=0, rtol=0)
    dy = torch.randn_like(expected)
    same(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy), atol=0, rtol=0)


@pytest.mark.parametrize("relu", [False, True])
def test_ties_nans_and_zeros_go_where_torch_lets_them(relu):
    x = torch.randint(-2, 3, (32, 4, 6, 6)).float()
    x[0, 0, 0, 0] = x[3, 2, 4, 5] = x[3, 2, 5, 5] = float("nan")
    x[1] = -0.0
    x = to_batch_last(x).requires_grad_()
    y = MaxPool.apply(x, (2, 2), relu)
    expected = nn.functional.max_pool2d(x.relu() if relu else x, 2)
    same(y, expected, equal_nan=True, atol=0, rtol=0)
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(output, x, dy)[0] for output in (y, expected))
    same(found, wanted, equal_nan=True, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch._vmap_internals")  # of torch 2.6 itself
@pytest.mark.parametrize("relu", [False, True])
def test_pooling_has_all_gradients(relu):
    x = images(2, 3, 5, 7, dtype=torch.float64)
    pool = lambda x: MaxPool.apply(x, (2, 3), relu)  # noqa: E731
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)
    assert torch.autograd.gradcheck(pool, x, check_batched_grad=True)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(16),
        nn.MaxPool2d(2, return_indices=True),
    ],
)
def test_other_pooling_is_left_to_torch(pool):
    kept = copy.deepcopy(pool)
    keep_order(kept)
    x = images(16, 3, 17, 17)
    assert kept is not pool
    assert type(kept) is nn.MaxPool2d or not kept.has_kernel(x)
    same(kept(x), pool(x), atol=0, rtol=0)


GEOMETRIES = [
    {},
    dict(kernel_size=5, padding=2),
    dict(stride=2, padding=1),
    dict(stride=(1, 2), dilation=(2, 1)),
    dict(groups=2, padding=(0, 2)),
    dict(bias=False),
]


def trained(model, density=0.3, **settings):
    """Return a Masking that trains `model` on sparse kernels, by steps that observe no dense gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = dict(growth_mode="random", redistribution_mode="none") | settings
    masking = Masking(optimizer, None, **settings, weights="sparse")
    masking.add_module(model, density=density)
    return masking


def calls_of(monkeypatch, kind):
    """Return a list that grows whenever an autograd function is applied."""
    calls, apply = [], kind.apply
    monkeypatch.setattr(kind, "apply", lambda *given: (calls.append(given), apply(*given))[1])
    return calls


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("size", [2, (3, 2)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [16, 33, 37, 100])
def test_a_convolution_that_is_pooled_at_once_is_exact(geometry, size, batch, turned, monkeypatch):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, **({"kernel_size": 3} | geometry))
    row = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(size))
    masking = trained(row)
    dense = copy.deepcopy(row)
    forget_order(dense)
    x = images(batch, 4, 12, 13, turned=turned)
    calls = calls_of(monkeypatch, PooledConv2d)
    y, expected = row(x), dense(x)
    assert bool(calls) == (batch != 33)  # a batch that leaves many lanes empty is not kept last
    same(y, expected)
    dy = torch.randn_like(expected)
    y.backward(dy)
    found, x.grad = x.grad, None
    expected.backward(dy)
    same(found, x.grad)
    mask = masking.masks["0.weight"].bool()
    same(conv.weight.grad, dense[0].weight.grad[mask])
    if conv.bias is not None:
        same(conv.bias.grad, dense[0].bias.grad)


def test_a_pooled_convolution_has_all_gradients(monkeypatch):
    row = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    trained(row)
    dense = copy.deepcopy(row)
    forget_order(dense)
    calls = calls_of(monkeypatch, PooledConv2d)
    x = images(16, 2, 6, 6, dtype=torch.float64)
    seconds = []
    for model in (row, dense):
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(dx.square().sum(), x)[0])
    assert calls
    same(*seconds)
    y, expected = row(x), dense(x)
    many = torch.randn(3, *y.shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(output, x, many, is_grads_batched=True)[0] for output in (y, expected))
    same(found, wanted)


def lenet_step(model, masking, x, labels):
    masking.zero_grad()
    loss = nn.functional.nll_loss(model(x), labels)
    loss.backward()
    masking.step()
    return loss.item()


@pytest.mark.parametrize("look", ["forward hook", "backward hook", "global hook", "forward"])
def test_what_looks_between_the_layers_sees_what_torch_shows(look, monkeypatch):
    model = models.build("lenet5")
    trained(model)
    x = torch.randn(16, 1, 28, 28)
    calls = calls_of(monkeypatch, PooledConv2d)
    model(x)
    assert len(calls) == 2
    seen = []
    if look == "forward hook":
        model.relu1.register_forward_hook(lambda *given: seen.append(given[-1]))
    elif look == "backward hook":
        model.relu1.register_full_backward_hook(lambda *given: seen.append(given[-1]))
    elif look == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[-1]))
    else:
        model.conv1.forward = functools.partial(type(model.conv1).forward, model.conv1)
    calls.clear()
    model(x).sum().backward()
    if look == "global hook":
        handle.remove()
        assert not calls
    else:
        assert len(calls) == 1
    assert seen or look == "forward"


def test_steps_that_observe_the_dense_gradient_see_it(monkeypatch):
    model = models.build("lenet5")
    masking = trained(model, growth_mode="momentum")
    calls = calls_of(monkeypatch, PooledConv2d)
    x, labels = torch.randn(16, 1, 28, 28), torch.randint(10, (16,))
    masking.held.expect(1)
    lenet_step(model, masking, x, labels)
    calls.clear()
    lenet_step(model, masking, x, labels)
    assert not calls
    assert masking.held.trained["conv1.weight"].observed.known


class Doubled(nn.Sequential):
    """A user's own sequence of layers."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.filterwarnings("ignore:(Dynamo does not know how|Graph break due)")  # of torch 2.8 and older
@pytest.mark.parametrize("kind", [nn.Sequential, Doubled])
def test_a_row_is_the_class_that_it_was(kind):
    model = kind(OrderedDict(conv=nn.Conv2d(1, 3, 3), relu=nn.ReLU(), pool=nn.MaxPool2d(2)))
    trained(model)
    assert isinstance(model, Row)
    assert isinstance(model, kind)
    x = torch.randn(16, 1, 8, 8)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), copy.copy(model), torch.load(buffer, weights_only=False)):
        assert type(other) is type(model)
        same(other(x), expected)
    same(model.pool(model.relu(model.conv(x))) * (2 if kind is Doubled else 1), expected)
    same(torch.compile(model, backend="eager")(x), expected)
    forget_order(model)
    assert type(model) is kind
    assert isinstance(model[:2], kind)


def test_a_row_under_autocast_is_torchs():
    row = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2))
    trained(row)
    x = torch.randn(16, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert row(x).dtype == torch.bfloat16


def test_images_too_small_for_a_window_are_refused_as_torch_does():
    row = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(4))
    trained(row)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        row(torch.randn(16, 2, 5, 5))


class Smallest(nn.MaxPool2d):
    """A user's own pooling."""

    def forward(self, input):
        return -super().forward(-input)


def test_a_pooling_of_the_users_own_is_called():
    row = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), Smallest(2))
    trained(row)
    x = images(16, 2, 6, 6)
    same(row(x), row[2](row[1](row[0](x))))


def test_a_relu_in_place_changes_what_the_caller_holds():
    row = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))
    keep_order(row)
    x = images(16, 2, 6, 6).detach()
    expected = x.relu()
    row(x)
    same(x, expected, atol=0, rtol=0)


def test_rows_without_a_pooling_stay_what_they_are():
    row = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    keep_order(row)
    assert type(row) is nn.Sequential
