"""The sparse layers of a Masking: the views of them, their removal, and what is saved."""

import logging

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, snapshot, train
from torch import nn

# Views


def test_counts_are_read_per_layer_and_in_total():
    masking = masked(mlp(20, 30, 10), density=0.1)
    assert masking.name2nonzeros == {"fc1.weight": 60, "fc2.weight": 30}
    assert masking.name2zeros == {"fc1.weight": 540, "fc2.weight": 270}
    assert (masking.total_nonzero, masking.total_zero, masking.total_removed) == (90, 810, 0)
    assert masking.density == 0.1


def test_counts_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="sparselearning"):
        masked(mlp(20, 30, 10), density=0.1, verbose=True)
    assert caplog.messages == [
        "fc1.weight: 60 of 600 active, density 0.1000",
        "fc2.weight: 30 of 300 active, density 0.1000",
        "Prune rate: 0.5000. Active weights: 90.",
    ]


def test_exploration_counts_every_weight_once():
    masking = masked(mlp(4, 4), density=0.25)
    mask = masking.masks["fc1.weight"]
    assert masking.exploration_rate == 0.25
    first = mask.clone()
    masking.grow = lambda masking, name, new_mask, total_regrowth, weight: (
        ~first & (torch.arange(16).reshape(4, 4) < 10)
    )
    masking.at_end_of_epoch()
    explored = first | (~first & (torch.arange(16).reshape(4, 4) < 10))
    assert masking.exploration_rate == explored.sum().item() / 16
    assert torch.equal(masking.ever_active["fc1.weight"], explored)


# Layers that become dense


def test_remove_weight_takes_the_name_of_the_weight_or_of_its_layer():
    masking = masked(mlp(20, 30, 10, 5))
    masking.remove_weight("fc1.weight")
    masking.remove_weight("fc3")
    assert list(masking.masks) == ["fc2.weight"]
    assert masking.baseline_nonzero == masking.total_nonzero == 60
    with pytest.raises(KeyError, match=r"No masked weight is called 'fc1.weight'. There are fc2.weight"):
        masking.remove_weight("fc1.weight")


def test_remove_weight_partial_name():
    masking = masked(mlp(20, 30, 10, 5))
    masking.remove_weight_partial_name("c2")
    assert list(masking.masks) == ["fc1.weight", "fc3.weight"]


def test_remove_type():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6)))
    masking = masked(model, density=0.5)
    masking.remove_type(nn.Sequential)  # a container holds no weights of its own
    assert list(masking.masks) == ["0.weight", "1.weight", "2.0.weight"]
    masking.remove_type(nn.Linear)
    assert list(masking.masks) == ["0.weight"]
    masking.remove_type((nn.Conv1d, nn.Conv2d))
    assert masking.masks == {}
    assert masking.baseline_nonzero == 0
    masking.at_end_of_epoch()  # nothing to do


def test_removed_weights_train_densely(caplog):
    model = mlp(20, 30, 10)
    masking = masked(model)
    with caplog.at_level(logging.INFO, logger="sparselearning"):
        masking.remove_weight("fc2.weight")
    assert caplog.messages == ["fc2.weight stays dense: 300 weights."]
    train(model, masking)
    assert (model.fc2.weight != 0).all()
    assert_masks_hold(masking)


# What is saved


def test_masks_of_another_model_are_refused_and_only_differences_named():
    masking = masked(mlp(20, 30, 10))
    before = snapshot(masking)
    state = masked(mlp(20, 30, 11, 5)).state_dict()
    with pytest.raises(RuntimeError, match="masks are of another model") as error:
        masking.load_state_dict(state)
    assert "fc2.weight: (11, 30) in the state, (10, 30) here" in str(error.value)
    assert "fc3.weight: (5, 11) in the state, absent here" in str(error.value)
    assert "fc1" not in str(error.value)
    assert same(before, masking.masks)


def test_a_state_without_history_begins_with_its_masks():
    masking = masked(mlp(6, 5, 4), density=0.5)
    state = masking.state_dict()
    for entry in state["layers"].values():
        del entry["ever_active"], entry["memory"]
    other = masked(mlp(6, 5, 4), density=0.5)
    other.layers[0].memory["mine"] = torch.ones(2)
    other.load_state_dict(state)
    assert all(torch.equal(layer.ever_active, masking.masks[layer.name]) for layer in other.layers)
    assert other.memory == {"fc1.weight": {}, "fc2.weight": {}}


def test_what_is_loaded_is_a_copy():
    masking = masked(mlp(6, 5), density=0.5)
    masking.layers[0].memory["mine"] = torch.ones(2)
    state = masking.state_dict()
    other = masked(mlp(6, 5), density=0.5)
    other.load_state_dict(state)
    state["layers"]["fc1.weight"]["memory"]["mine"].zero_()
    assert other.memory["fc1.weight"]["mine"].all()
