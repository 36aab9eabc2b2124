"""Prune, redistribute and grow functions of a user: what they may do, and which errors they meet."""

import functools

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train

from sparselearning import Masking, Updates, network_wide
from sparselearning.functions import FunctionError
from sparselearning.grow import GROWTH_FUNCTIONS

TENTH = Updates(density=lambda step: 0.1)

# At the door


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("prune_mode", "'magnitude', 'soft_magnitude', 'SET', 'threshold', 'adaptive_threshold', 'global_magnitude'"),
        ("growth_mode", "'momentum', 'gradient', 'random', 'guided', 'momentum_neuron', 'global_momentum'"),
        ("redistribution_mode", "'momentum', 'magnitude', 'nonzeros', 'nonzero', 'remaining', 'none'"),
    ],
)
def test_an_unknown_mode_is_refused(argument, names):
    with pytest.raises(ValueError, match=f"Unknown {argument} 'momentun'. Pass a function, or one of {names}"):
        masked(mlp(5, 5), **{argument: "momentun"})


@pytest.mark.parametrize("argument", ["prune_mode", "growth_mode", "redistribution_mode"])
def test_a_function_of_the_wrong_shape_is_refused(argument):
    def mine(masking, name):
        """Too few arguments."""

    with pytest.raises(TypeError, match=rf"{argument} function mine\(masking, name\) cannot be called as mine\("):
        masked(mlp(5, 5), **{argument: mine})


@pytest.mark.parametrize("mode", ["growth_mode", "redistribution_mode"])
def test_an_optimizer_without_momentum_is_refused_at_the_door(mode):
    model = mlp(5, 5)
    others = {"growth_mode": "random", "redistribution_mode": "none"} | {mode: "momentum"}
    with pytest.raises(RuntimeError, match=r"SGD holds no momentum .* Use SGD\(momentum=0.9\), Adam or AdamW, or"):
        masked(model, sgd(model, momentum=0), **others)


# What it may do


def test_a_growth_function_may_set_the_value_of_new_weights():
    def grow_at_a_tenth(masking, name, new_mask, total_regrowth, weight):
        grown = GROWTH_FUNCTIONS["momentum"](masking, name, new_mask, total_regrowth, weight)
        weight[grown & ~new_mask] = 0.1
        return grown

    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode=grow_at_a_tenth)
    train(model, masking)
    before = snapshot(masking)
    masking.at_end_of_epoch()
    for layer in masking.layers:
        grown = layer.weight[layer.mask & ~before[layer.name]]
        assert grown.numel() > 0
        assert (grown == 0.1).all()


# What it returns


def test_masks_are_as_before_when_a_function_fails():
    def fails(masking, name, new_mask, total_regrowth, weight):
        new_mask[:] = True
        raise RuntimeError("mine")

    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode=fails, updates=TENTH)
    train(model, masking)
    before = snapshot(masking)
    with pytest.raises(RuntimeError, match="mine"):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)
    assert masking.total_nonzero == masking.baseline_nonzero == 180
    masking.check()
    train(model, masking)
    assert_masks_hold(masking)


@pytest.mark.parametrize(
    ("returned", "came"), [(None, "NoneType"), (3, "int"), (torch.ones(2, 2), r"shape \(2, 2\)")], ids=str
)
def test_a_function_that_returns_no_mask_is_named(returned, came):
    masking = masked(mlp(20, 30), growth_mode=lambda *_: returned)
    with pytest.raises(TypeError, match=rf"Expected a mask of shape \(30, 20\) for fc1.weight, got {came}"):
        masking.at_end_of_epoch()


@pytest.mark.parametrize("returned", [None, 7, {}])
def test_a_network_wide_function_returns_all_masks(returned):
    masking = masked(mlp(20, 30), prune_mode=network_wide(lambda masking: returned))
    with pytest.raises(TypeError, match=r"Expected a dict from the name of every layer to its mask"):
        masking.at_end_of_epoch()


@pytest.mark.parametrize(
    ("importance", "came"),
    [("much", "'much'"), (None, "None"), (torch.ones(2), r"a tensor of shape \(2,\)"), (torch.ones(0), r"a tensor of")],
)
def test_importance_of_another_kind_is_refused(importance, came):
    masking = masked(mlp(10, 20, 10), redistribution_mode=lambda *_: importance)
    with pytest.raises(FunctionError, match=rf"importance of fc1.weight, a number or a 0-d tensor, got {came}"):
        masking.at_end_of_epoch()


# Patterns


def half_of_a_block(masking, mask, weight, name):
    mask = mask.clone()
    mask[0] = False
    return mask


def one_full_row(masking, name, new_mask, total_regrowth, weight):
    mask = new_mask.clone()
    mask[0] = True
    return mask


@pytest.mark.parametrize(
    ("argument", "function", "named", "pattern", "density"),
    [
        ("prune_mode", half_of_a_block, "'half_of_a_block'", "block:2x2", 1.0),
        ("prune_mode", functools.partial(half_of_a_block), "functools.partial(<function half_of_a", "block:2x2", 1.0),
        ("growth_mode", one_full_row, "'one_full_row'", "2:4", 0.5),
    ],
)
def test_a_function_that_breaks_a_pattern_is_named_and_changes_nothing(argument, function, named, pattern, density):
    modes = {"growth_mode": "random", "redistribution_mode": "none", argument: function}
    masking = masked(mlp(4, 4), density=density, pattern=pattern, **modes)
    before = snapshot(masking)
    with pytest.raises(FunctionError) as refused:
        masking.at_end_of_epoch()
    assert str(refused.value).startswith(f"{argument}={named}")
    assert f"does not keep the pattern '{pattern}' of fc1.weight" in str(refused.value)
    assert same(before, masking.masks)


@pytest.mark.parametrize(
    ("pattern", "modes", "message"),
    [
        (
            "fan-in",
            dict(updates=TENTH),
            "The pattern 'fan-in' keeps the density of each layer",
        ),
        (
            "neuron",
            dict(updates=TENTH),
            "The pattern 'neuron' keeps the density of each layer",
        ),
        ("block:1x2", dict(prune_mode="sign_flip"), "prune_mode='sign_flip' moves single weights"),
        ("2:4", dict(growth_mode="momentum_neuron"), "growth_mode='momentum_neuron' moves single weights"),
        ("neuron", dict(redistribution_mode="nonzeros"), "The units of pattern 'neuron' have 4, 8 weights"),
        ("neuron", dict(prune_mode="global_magnitude"), "The units of pattern 'neuron' have 4, 8 weights"),
    ],
)
def test_what_a_pattern_cannot_do_is_refused_at_the_door(pattern, modes, message):
    model = mlp(8, 4, 8)
    masking = Masking(sgd(model), None, **{"growth_mode": "random", "redistribution_mode": "none"} | modes)
    with pytest.raises(ValueError, match=message):
        masking.add_module(model, 0.25, pattern=pattern)
    assert masking.layers == []


def test_a_second_module_of_other_units_is_refused_where_weights_would_move():
    model = mlp(10, 20, 10)
    masking = Masking(sgd(model), None, growth_mode="random")
    masking.add_module(model.fc1, 0.4, pattern="block:2x2")
    with pytest.raises(ValueError, match=r"The units of pattern 'block:2x2' have 1, 4 weights in different layers"):
        masking.add_module(model.fc2, 0.05)
