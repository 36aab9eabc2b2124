"""Masks that begin with the largest magnitudes of each layer."""

import copy

import pytest
import torch
from helpers import masked, mlp
from oracles.top_kast_start import largest

from sparselearning import Masking


def positions(mask):
    return set(mask.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize("distribution", ["", ":constant", ":linear", ":erdos_renyi_kernel"])
def test_the_largest_magnitudes_of_each_layer_at_the_density_of_its_distribution(distribution):
    model = mlp(20, 30, 10)
    counts = masked(copy.deepcopy(model), density=0.2, sparse_init=distribution[1:] or "constant").name2nonzeros
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masking = masked(model, density=0.2, sparse_init=f"magnitude{distribution}")
    assert masking.name2nonzeros == counts
    for name, mask in masking.masks.items():
        assert positions(mask) == largest(weights[name], counts[name])


def test_top_kast_begins_with_them_at_the_densities_of_erk():
    model = mlp(20, 30, 10)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking.from_method("top_kast", model, optimizer, total_steps=100, density=0.2)
    for name, mask in masking.masks.items():
        assert positions(mask) == largest(weights[name], masking.name2nonzeros[name])


def test_a_pattern_and_densities_by_name_hold():
    model = mlp(20, 30, 10)
    weight = model.fc1.weight.detach().clone()
    masking = masked(model, density={"fc1": 0.5, "*": 0.25}, sparse_init="magnitude", pattern={"fc1": "2:4"})
    assert masking.name2nonzeros == {"fc1.weight": 300, "fc2.weight": 75}
    expected = weight.abs().reshape(-1, 4).topk(2).indices.sort().values
    found = masking.masks["fc1.weight"].reshape(-1, 4).nonzero()[:, 1].reshape(-1, 2)
    assert torch.equal(found, expected)


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="Unknown sparse_init 'magnitude:even'"):
        masked(mlp(4, 3), sparse_init="magnitude:even")
