"""Weights chosen by name: their densities, and weights that stay dense."""

import pytest
import torch
from helpers import mlp, train
from torch import nn

from sparselearning import Masking
from sparselearning.start.names import by_density, matches, named

NAMES = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.downsample.0.weight", "fc.weight"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv1", NAMES[:1]),
        ("conv1.weight", NAMES[:1]),
        ("*conv1", NAMES[:2]),
        ("layer?.*", NAMES[1:3]),
        ("*.downsample.*", NAMES[2:3]),
        ("[cf]*", [NAMES[0], NAMES[3]]),
        ("*", NAMES),
        ("CONV1", []),
        ("conv", []),
    ],
)
def test_patterns(pattern, expected):
    assert [name for name in NAMES if matches(name, pattern)] == expected


def test_first_and_last():
    assert named(NAMES, ["first", "last"]) == {NAMES[0], NAMES[3]}
    assert named(NAMES, "last") == {NAMES[3]}
    assert named(NAMES, ["first", "conv1"]) == {NAMES[0]}
    assert named(["weight"], ["first", "last"]) == {"weight"}


def test_the_first_pattern_that_matches_counts():
    groups = by_density(NAMES, {"layer1.0.conv1": 0.5, "*conv1": 0.2, "*": 0.1})
    assert groups == [("layer1.0.conv1", 0.5, NAMES[1:2]), ("*conv1", 0.2, NAMES[:1]), ("*", 0.1, NAMES[2:])]
    assert by_density(NAMES, 0.3) == [("*", 0.3, NAMES)]
    assert by_density(NAMES[:1], {"conv1": 0.5, "*": 0.1}) == [("conv1", 0.5, NAMES[:1])], "'*' may find nothing left"


def build(density, init="constant", **choice):
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.Flatten(), *mlp(360, 30, 10))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, density, init, **choice)
    return model, masking


def test_each_layer_has_its_density_from_the_start():
    _, masking = build({"0": 0.5, "2": 0.02, "*": 0.1})
    assert masking.name2nonzeros == {"0.weight": 45, "2.weight": 216, "4.weight": 30}


def test_a_distribution_divides_within_each_pattern():
    _, masking = build({"0": 0.5, "*": 0.1}, "erdos_renyi_kernel")
    assert masking.name2nonzeros["0.weight"] == 45
    assert masking.name2nonzeros["2.weight"] + masking.name2nonzeros["4.weight"] == 1110
    assert masking.name2nonzeros["4.weight"] == round(1110 * 40 / 430)


def test_dense_layers_keep_all_their_weights():
    model, masking = build(0.1, dense=["first", "4"])
    values = model[4].weight.detach().clone()
    assert list(masking.masks) == ["2.weight"]
    assert masking.total_nonzero == 1080
    train(model, masking, inputs=torch.randn(8, 1, 8, 8))
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 1080
    assert (values != 0).all()
    assert (model[4].weight != 0).all()


@pytest.mark.parametrize(
    ("density", "choice", "message"),
    [
        ({"0": 0.5}, {}, r"No pattern of density=\{'0': 0.5\} matches 2\.weight. Add one, or '\*' for all others"),
        ({"fc": 0.5, "*": 0.1}, {}, "The pattern 'fc' of density=.* matches none of the weights 0.weight, 2.weight"),
        (
            {"*": 0.1, "2": 0.5},
            {},
            "The pattern '2' .* matches none of the weights .* that an earlier pattern does not match",
        ),
        ({"2": 1.5, "*": 0.1}, {}, r"Expected a density in \(0, 1\] for '2', got 1.5"),
        ({"0": 0.001, "*": 0.1}, {}, "A density of 0.001 leaves none of 90 weights. Pass a larger one"),
        (0.1, {"dense": ["fc1"]}, "'fc1' matches none of the weights 0.weight, 2.weight, 4.weight"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(density, choice, message):
    with pytest.raises(ValueError, match=message):
        build(density, **choice)


def test_nothing_left_to_mask_is_refused():
    with pytest.raises(ValueError, match="All weights of Sequential that could be masked are named to stay dense"):
        build(0.1, dense="*")
