"""Dead units go, outputs stay."""

import copy

import pytest
import torch
from helpers_conversion import cut_units, outputs_differ, sparsify
from helpers_sparse import sparse_weight
from odd_models import ODD
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


@pytest.mark.long
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


@pytest.mark.filterwarnings("ignore:.*(nested|torch.jit|weight_norm):")
@pytest.mark.parametrize("name", ODD)
def test_smaller_models_do_the_same(name):
    model, example, _ = ODD[name]()
    cut_units(sparsify(model, 0.8))
    small, removed = remove_dead_units(model, example)
    assert not outputs_differ(model, small, example)
    assert removed.verified.startswith("outputs equal on the example" if removed else "not verified")
    assert not removed.notes


def constant_channel(pool, size=9, padding=0):
    """A convolution whose first channel is the constant 1 and second 0, before a pooling and another convolution."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), pool, nn.Conv2d(4, 3, 2, padding=padding))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([1.0, 0.0])
    return model, torch.randn(2, 2, size, size)


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        (nn.AvgPool2d(2), 2),
        (nn.AvgPool2d(2, ceil_mode=True), 2),
        (nn.AvgPool2d((3, 2), divisor_override=2), 2),
        (nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), 1),  # windows at the border hold fewer pixels
        (nn.AvgPool2d(3, padding=1), 1),  # and the zeros of the padding count
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), 2),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False, ceil_mode=True), 2),
        (nn.MaxPool2d(3, padding=1, ceil_mode=True), 2),
        (nn.AdaptiveAvgPool2d(4), 2),
        (nn.AdaptiveMaxPool2d(4), 2),
        (nn.LPPool2d(2, 2), 0),
    ],
)
def test_constants_go_through_pooling(pool, count):
    model, x = constant_channel(pool)
    small, removed = remove_dead_units(model, x)
    assert sum(removed.values()) == count
    assert not removed.notes
    assert_same_outputs(model, small, torch.randn(2, 2, 9, 9))


def test_constants_go_through_a_norm_over_flattened_pixels():
    parts = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4 * 36), nn.Linear(4 * 36, 5)
    model = sparsify(nn.Sequential(*parts), 0.5)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1
    small, removed = remove_dead_units(model, torch.randn(2, 1, 8, 8))
    assert removed == {"0": 1}
    assert small[3].num_features == 3 * 36
    assert_same_outputs(model, small, torch.randn(2, 1, 8, 8))


def test_features_of_tokens_lie_apart_after_flatten():
    model = sparsify(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)), 0.8)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1
        model[3].weight[:, 1::4] = 0
    small, removed = remove_dead_units(model, torch.randn(2, 3, 5))
    assert removed == {"0": 2}
    assert small[3].in_features == 6
    assert_same_outputs(model, small, torch.randn(2, 3, 5))


def test_a_layer_whose_units_a_parent_counts_keeps_them():
    """The size in the model's own code is not that of the smaller layer."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.second = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)
            self.third, self.fourth = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.second(self.act(self.first(x))) * (self.first.out_features / 6)
            return self.fourth(self.third(y))

    model = sparsify(Fixed(), 0.8)
    cut_units(model)
    small, removed = remove_dead_units(model, torch.randn(3, 4))
    assert "first" not in removed
    assert removed["third"] > 0
    assert removed.notes[0].startswith("first: its units stay (on the example output differs by")
    assert not outputs_differ(model, small, torch.randn(3, 4))
