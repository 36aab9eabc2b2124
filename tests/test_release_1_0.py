"""The names and signatures of release 1.0 work, and functions written for it run unchanged.

Its defects are named beside the tests that would have failed on it.
"""

import math

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, same, snapshot, train
from torch import nn

import sparselearning.core
from sparselearning import Masking
from sparselearning.core import CosineDecay
from sparselearning.funcs import growth_funcs, prune_funcs, redistribution_funcs


def test_the_signatures_of_1_0_are_taken_by_position():
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    masking = Masking(optimizer, CosineDecay(0.5, 100), 0.5, "SET", "random", "nonzero")
    masking.add_module(model, 0.1, "linear")
    masking.remove_weight_partial_name(partial_name="bias")
    masking.remove_type(nn.BatchNorm2d)
    masking.remove_weight("fc2")
    masking.prune_every_k_steps = 2
    train(model, masking, 4)
    masking.print_nonzero_counts()
    assert masking.get_momentum_for_weight(model.fc1.weight).shape == (30, 20)
    assert_masks_hold(masking)


def test_the_paths_of_1_0_hold_its_names():
    assert sparselearning.core.add_sparse_args
    assert {"magnitude", "SET", "threshold", "global_magnitude"} <= prune_funcs.keys()
    assert {"momentum", "random", "momentum_neuron", "global_momentum_growth"} <= growth_funcs.keys()
    assert {"momentum", "magnitude", "nonzero", "none"} <= redistribution_funcs.keys()


# Functions in the shape of 1.0's tutorial

pytestmark = pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")  # of torch, to who uses .byte()


def largest_momentum(masking, name, weight, mask):
    """Return a Python number, read from the optimizer's state with a byte index."""
    return masking.optimizer.state[weight]["momentum_buffer"][mask.byte()].abs().max().item()


def gradient_variance(masking, name, weight, mask):
    """Return a 0-d tensor, read from the gradient."""
    return torch.var(weight.grad[mask.byte()])


def share_of_layer(masking, name, weight, mask):
    """Return a number from the counts of the layer and of the network."""
    return masking.name2nonzeros[name] / (masking.total_nonzero + masking.total_zero) + masking.name2variance[name]


def smallest_in_place(masking, mask, weight, name):
    """Sort all weights and edit the mask in place, through .data and a flat view."""
    count = math.ceil(masking.name2prune_rate[name] * masking.name2nonzeros[name])
    if count == 0:
        return weight.data != 0.0
    importance = torch.abs(weight.data) * mask
    importance[mask == 0] = 0.0
    _, order = torch.sort(importance.view(-1))
    mask.data.view(-1)[order[: masking.name2zeros[name] + count]] = 0.0
    return mask


def beyond_a_threshold(masking, mask, weight, name):
    """Return a new mask of floats."""
    cut = weight.data[mask.byte()].abs().median().item()
    return (weight.data.abs() > cut).float()


def largest_in_place(masking, name, new_mask, total_regrowth, weight):
    """Edit the new mask in place through .data and a flat view."""
    score = masking.get_momentum_for_weight(weight).abs() * (new_mask == 0).float()
    _, order = torch.sort(score.flatten(), descending=True)
    new_mask.data.view(-1)[order[:total_regrowth]] = 1.0
    return new_mask


def coin_flips(masking, name, new_mask, total_regrowth, weight):
    """Return a new mask of bytes, with about as many new weights as asked for."""
    free = (new_mask == 0).sum().item()
    if free == 0:
        return new_mask
    return new_mask.byte() | (torch.rand(new_mask.shape) < total_regrowth / free)


def row_by_row(masking, name, new_mask, total_regrowth, weight):
    """Edit one row after the other; the number comes from what was pruned here, not from what was asked for."""
    for i in range(new_mask.shape[0]):
        new_mask[i] = new_mask[i] | (torch.rand(new_mask.shape[1:]) < masking.name2removed[name] / new_mask.numel())
    return new_mask


@pytest.mark.parametrize("growth", [largest_in_place, coin_flips, row_by_row])
@pytest.mark.parametrize("redistribution", [largest_momentum, gradient_variance, share_of_layer])
@pytest.mark.parametrize("prune", [smallest_in_place, beyond_a_threshold])
def test_functions_written_for_1_0_run_unchanged(prune, redistribution, growth):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode=prune, redistribution_mode=redistribution, growth_mode=growth)
    before = snapshot(masking)
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert sum(masking.name2variance.values()) == pytest.approx(1)
        assert masking.total_removed > 0
    assert not same(before, masking.masks)
    if growth is largest_in_place:
        assert masking.total_nonzero == 180
    elif growth is coin_flips:
        assert masking.total_nonzero == pytest.approx(180, rel=0.25)


def test_in_place_functions_equal_the_built_in_ones():
    def trained(prune, growth):
        torch.manual_seed(5)
        model = mlp(20, 30, 10)
        masking = masked(model, prune_mode=prune, growth_mode=growth)
        train(model, masking, 4)
        masking.at_end_of_epoch()
        backward(model)
        return masking.masks

    assert same(trained(smallest_in_place, largest_in_place), trained("magnitude", "momentum"))
