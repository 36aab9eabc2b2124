"""Receptive fields: outputs begin with inputs near their own place; exact counts, equal degrees, and how often."""

import pytest
import torch
from helpers import masked, mlp
from oracles import cht_soft
from torch import nn

from sparselearning import Masking
from sparselearning.flags import sparse_init


@pytest.mark.parametrize("density", [0.05, 0.2, 0.37, 0.9])
@pytest.mark.parametrize("distribution", ["", ":linear", ":erdos_renyi_kernel"])
def test_counts_are_those_of_the_distribution_and_outputs_have_equally_many(density, distribution):
    counts = masked(mlp(20, 30, 10), density=density, sparse_init=distribution[1:] or "constant").name2nonzeros
    masking = masked(mlp(20, 30, 10), density=density, sparse_init=f"receptive_field{distribution}")
    assert masking.name2nonzeros == counts
    for mask in masking.masks.values():
        degrees = mask.sum(dim=1)
        assert degrees.max() - degrees.min() <= 1


@pytest.mark.long
def test_an_output_draws_an_input_as_often_as_its_distance_says():
    draws = 1500
    found = torch.zeros(3, 7)
    for seed in range(draws):
        torch.manual_seed(seed)
        found += masked(nn.Linear(7, 3, bias=False), density=1 / 7, sparse_init="receptive_field").masks["weight"]
    expected = torch.tensor([cht_soft.shares(output, 3, 7) for output in range(3)])
    torch.testing.assert_close(found / draws, expected, rtol=0, atol=5 * (0.25 / draws) ** 0.5)


def test_links_lie_near_the_diagonal_and_large_layers_are_drawn_in_parts(monkeypatch):
    whole = masked(nn.Linear(40, 80, bias=False), density=0.1, sparse_init="receptive_field").masks["weight"]
    monkeypatch.setattr("sparselearning.start.receptive.TOGETHER", 100)
    parts = masked(nn.Linear(40, 80, bias=False), density=0.1, sparse_init="receptive_field").masks["weight"]
    for mask in (whole, parts):
        output, position = mask.nonzero().unbind(1)
        distance = (position - output / 2).abs()
        assert torch.minimum(distance, 40 - distance).mean() < 4  # of a random mask 10
        assert mask.sum() == 320
        assert (mask.sum(dim=1) == 4).all()


def test_convolutions_and_patterns_take_it():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    masking = masked(model, density=0.25, sparse_init="receptive_field", pattern={"0": "2:4", "*": "unstructured"})
    assert masking.total_nonzero == round(0.25 * 288) + round(0.25 * 32)
    masking.check()


def test_weights_on_the_meta_device_are_refused_and_the_flag_is_known():
    with torch.device("meta"):
        model = nn.Linear(30, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sparse_init='receptive_field' draws scores, which are as large as the dense"):
        Masking.from_method("set", model, optimizer, 10, weights="sparse", sparse_init="receptive_field")
    assert sparse_init("receptive_field:linear") == "receptive_field:linear"
