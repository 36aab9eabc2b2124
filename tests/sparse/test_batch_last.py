"""torch's layers keep the memory order between sparse layers, and compute the same."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from sparselearning.sparse import available
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.memory_order import is_turned, to_batch_last
from sparselearning.sparse.normalisation import Normalisation, has_kernel

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        *(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.BatchNorm2d(5), nn.MaxPool2d(2, ceil_mode=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveAvgPool2d((None, 2))),
    ],
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
    assert is_turned(results[1][0]) == (results[1][0][0, 0].numel() > 1)
    assert not is_turned(results[2][0])
    forget_order(keeping)
    assert type(keeping) is type(layer)


def turned_images(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return to_batch_last(torch.randn(shape, dtype=dtype) * 3 + 5).requires_grad_()


def both_norms(**settings):
    """Return a batch norm of torch's, and one that keeps the memory order."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(5, **settings)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    keeping = copy.deepcopy(norm)
    keep_order(keeping)
    return norm, keeping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(momentum=None), dict(momentum=0.5, eps=0.1), dict(affine=False), dict(track_running_stats=False)],
)
def test_a_batch_norm_trains_as_torchs_own(settings, dtype):
    norm, keeping = (module.to(dtype) for module in both_norms(**settings))
    for size in (16, 32, 48):
        x, dy = turned_images(size, 5, 3, 7, dtype=dtype), turned_images(size, 5, 3, 7, dtype=dtype)
        assert has_kernel(keeping, x)
        results = []
        for module in (norm, keeping):
            y = module(x)
            given = [x, *module.parameters()]
            results.append((y, *torch.autograd.grad(y, given, dy), *module.buffers()))
        assert is_turned(results[1][0])
        assert is_turned(results[1][1])
        torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-5)
    for module in (norm.eval(), keeping.eval()):
        results.append(module(x))
    torch.testing.assert_close(results[-1], results[-2], atol=1e-5, rtol=1e-5)


def test_a_batch_norm_of_large_numbers_loses_no_more_than_torchs_own():
    norm, keeping = both_norms()
    x = to_batch_last(torch.randn(256, 5, 16, 16) + 1e3)
    exact = copy.deepcopy(norm).double()(x.double())
    error = [(module(x) - exact).abs().max() for module in (norm, keeping)]
    assert error[1] <= 2 * error[0]


def test_a_batch_norm_has_all_gradients():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 16), 3, 3))
    given = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def normalised(x, weight, bias):
        turned = x.reshape(2, 3, 4, 4).movedim(0, -1).contiguous().movedim(-1, 0)
        return Normalisation.apply(turned, weight, bias, 1e-3)[0]

    assert torch.autograd.gradcheck(normalised, given)
    assert torch.autograd.gradgradcheck(normalised, given)
    assert torch.autograd.gradcheck(lambda x: normalised(x, None, None), given[:1])


def test_a_frozen_batch_norm_of_an_input_without_gradient_gets_none():
    _, keeping = both_norms()
    keeping.weight.requires_grad_(False)
    keeping(turned_images(16, 5, 2, 2).detach()).sum().backward()
    assert keeping.weight.grad is None
    torch.testing.assert_close(keeping.bias.grad, torch.full((5,), 64.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda norm, x: torch.compile(norm, backend="eager", fullgraph=True)(x),
        lambda norm, x: torch.func.vmap(norm, in_dims=1, out_dims=1)(x.unsqueeze(1)).squeeze(1),
        lambda norm, x: norm(x.double()).float() if norm.double() else None,
        lambda norm, x: torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False),
    ],
    ids=["compile", "vmap", "double", "checkpoint"],
)
def test_a_batch_norm_under_other_peoples_eyes(call):
    norm, keeping = both_norms(track_running_stats=False)
    x = turned_images(16, 5, 2, 3)
    found = call(keeping, x)
    torch.testing.assert_close(found, norm(x), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(norm(x).square().sum(), x)[0], atol=1e-4, rtol=1e-4)


def test_one_number_for_each_channel_is_refused_as_torch_does():
    norm, keeping = both_norms()
    for module in (norm, keeping):
        with pytest.raises(ValueError, match="more than 1 value"):
            module(torch.ones(1, 5, 1, 1))


def test_many_gradients_of_a_batch_norm_are_computed_at_once():
    norm, keeping = both_norms()
    x = turned_images(16, 5, 3, 7)
    many = torch.randn(4, *x.shape)
    found, expected = (torch.autograd.grad(n(x), x, many, is_grads_batched=True)[0] for n in (keeping, norm))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
