"""Dead units go, outputs stay."""

import copy

import pytest
import torch
from helpers_sparse import sparse_weight
from torch import nn

from sparselearning.models import build
from sparselearning.sparse import remove_dead_units


def assert_same_outputs(model, small, x):
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() <= 1e-5


def two_layers(between, padding=0, bias=(1.0, -2.0, 0.5)):
    """Three channels: the first has no weights in, the second none out."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *between, nn.Conv2d(3, 4, 3, padding=padding)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[-1].weight[:, 1] = 0
        model[0].bias.copy_(torch.tensor(bias))
    return model


def norm():
    layer = nn.BatchNorm2d(3)
    for tensor in (layer.running_mean, layer.weight.data, layer.bias.data):
        tensor.uniform_(-1, 1)
    return layer


@pytest.mark.parametrize("between", [[], [nn.ReLU()], [norm(), nn.GELU(), nn.MaxPool2d(2)]])
def test_channels_without_weights_in_or_out_are_removed(between):
    model = two_layers(between)
    small, removed = remove_dead_units(model, torch.randn(2, 2, 12, 12))
    assert removed == {"0": 2}
    assert small[0].out_channels == small[-1].in_channels == 1
    assert_same_outputs(model, small, torch.randn(2, 2, 12, 12))


def test_a_constant_before_padding_stays_unless_it_is_zero():
    x = torch.randn(2, 2, 8, 8)
    assert remove_dead_units(two_layers([nn.ReLU()], padding=1), x)[1] == {"0": 1}
    model = two_layers([nn.ReLU()], padding=1, bias=(-1.0, 0.0, 0.0))
    small, removed = remove_dead_units(model, x)
    assert removed == {"0": 2}
    assert_same_outputs(model, small, x)


def test_removal_goes_on_through_the_network():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[4].weight[:, 1:] = 0  # leaves one unit of the second layer,
        model[2].weight[0, 1:] = 0  # which reads one of the first
    small, removed = remove_dead_units(model, torch.randn(3, 4))
    assert removed == {"0": 3, "2": 3}
    assert_same_outputs(model, small, torch.randn(3, 4))


def test_channels_before_flatten_take_their_pixels_along():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    with torch.no_grad():
        model[0].weight[2] = 0
    small, removed = remove_dead_units(model, torch.randn(2, 1, 8, 8))
    assert removed == {"0": 1}
    assert small[2].in_features == 3 * 36
    assert_same_outputs(model, small, torch.randn(2, 1, 8, 8))


def test_a_layer_keeps_one_unit():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    small, _ = remove_dead_units(model, torch.randn(2, 3))
    assert small[0].out_features == 1
    assert_same_outputs(model, small, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("name", "density"), [("lenet300-100", 0.01), ("lenet5", 0.03), ("vgg-d", 0.002), ("wrn-16-8", 0.002)]
)
def test_trained_sparse_models_shrink_and_stay_exact(name, density):
    model = build(name).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(sparse_weight(module.weight.shape, density))
                module.weight.mul_((density * module.weight[0].numel()) ** -0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.bias.uniform_(-0.5, 0.5)
    x = torch.randn(4, 1, 28, 28) if name.startswith("lenet") else torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    small, removed = remove_dead_units(model, x)
    assert sum(removed.values()) > 10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert_same_outputs(model, small, x)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())


def test_a_channel_that_a_sum_reads_stays():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(y) + y

    model = Residual()
    nn.init.zeros_(model.second.weight)
    assert remove_dead_units(model, torch.randn(2, 4))[1] == {}
