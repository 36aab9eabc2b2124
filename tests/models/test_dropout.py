"""Dropout by random bits keeps the share, the scale and the gradients of torch's."""

import pytest
import torch
from torch import nn

from sparselearning.models import build
from sparselearning.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_share_is_dropped_and_the_rest_enlarged(p, order):
    torch.manual_seed(0)
    x = torch.ones(50, 40, 30, 5).to(memory_format=order).requires_grad_()
    y = Dropout(p)(x)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-2 if p > 0.9 else 1e-4, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert y.is_contiguous(memory_format=order)
    for dim in range(4):  # no pattern along a dimension
        means = kept.float().transpose(0, dim).flatten(1).mean(1)
        assert (means - (1 - p)).abs().max() < 6 * (p * (1 - p) / (x.numel() / len(means))) ** 0.5


def test_a_seed_gives_the_same_numbers_and_another_one_others():
    x, layer = torch.ones(1000), Dropout(0.5)

    def drawn(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_elsewhere_it_is_torchs():
    x = torch.randn(3, 5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    for given in (x.double(), x.bfloat16(), torch.empty(0, 3)):
        torch.manual_seed(0)
        found = Dropout(0.5)(given)
        assert found.dtype == given.dtype
        assert found.shape == given.shape
    watched = x.clone().requires_grad_()
    twice = torch.autograd.grad(Dropout(0.5)(watched).square().sum(), watched, create_graph=True)[0]
    assert twice.requires_grad


def test_wide_resnets_drop_out_by_it():
    kinds = {type(module) for module in build("wrn-16-8").modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
