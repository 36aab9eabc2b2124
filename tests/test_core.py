"""Masking in training: steps, whole updates, defaults, and extremes of size and density."""

import copy
import logging

import pytest
import torch
from helpers import assert_masks_hold, backward, layer_with, masked, mlp, same, sgd, snapshot, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning import CosineDecay, Masking, Updates
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.selection import add_highest, drop_lowest
from sparselearning.weights.zeros import Zeros

T, F = True, False


def test_a_training_loop_keeps_the_number_of_weights_and_moves_them():
    """Train as the README does."""
    model = mlp(20, 30, 10)
    masking = Masking(sgd(model), CosineDecay(0.5, T_max=20))
    masking.add_module(model, density=0.1)
    first = snapshot(masking)
    for _ in range(4):
        train(model, masking, steps=5)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert masking.total_nonzero == masking.baseline_nonzero == 90
    assert masking.steps == 20
    assert masking.prune_rate == 0.005
    assert not any(torch.equal(mask, first[name]) for name, mask in masking.masks.items())


OWN_FUNCTIONS = dict(
    prune_mode=lambda masking, mask, weight, name: drop_lowest(weight.abs(), mask, 2),
    growth_mode=lambda masking, name, mask, count, weight: add_highest(
        masking.get_momentum_for_weight(weight).abs(), mask, count
    ),
)


@pytest.mark.parametrize("modes", [{}, OWN_FUNCTIONS], ids=["built in", "own"])
def test_one_update_by_hand(modes):
    masking = layer_with(
        [[0.5, -0.1, 0.0, 0.0, 0.2, 0.9]],
        [[T, T, F, F, T, T]],
        momentum=[[0.0, 0.3, 0.1, -0.4, 0.1, 0.0]],
        **modes,
    )
    masking.at_end_of_epoch()
    # Out go -0.1 and 0.2. In come the momenta -0.4 and 0.3: a weight that returns at once keeps its value.
    assert masking.masks["weight"].tolist() == [[T, T, F, T, F, T]]
    assert masking.layers[0].weight.tolist() == [pytest.approx([0.5, -0.1, 0.0, 0.0, 0.0, 0.9])]
    assert_masks_hold(masking)


def test_an_update_before_the_first_step_keeps_counts():
    model = mlp(20, 30, 10)
    masking = masked(model)
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == masking.baseline_nonzero
    assert not same(before, masking.masks)
    assert masking.name2variance == {"fc1.weight": 0.5, "fc2.weight": 0.5}  # no momentum: all layers alike
    assert_masks_hold(masking)


def test_a_prune_rate_of_one_moves_everything():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_rate=1, density=0.1)
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2removed == {"fc1.weight": 60, "fc2.weight": 30}
    assert masking.total_removed == masking.total_nonzero == 90


@pytest.mark.parametrize("growth_mode", GROWTH_FUNCTIONS)
@pytest.mark.parametrize(("widths", "weights"), [((20, 30, 10), "kept"), ((1, 1, 1), "zero")])
def test_a_full_network_stays_full(growth_mode, widths, weights):
    model = mlp(*widths)
    if "dense" in growth_mode:
        weights = "kept"
    masking = masked(model, density=1.0, growth_mode=growth_mode, weights=weights)
    for _ in range(3):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        masking.check()
    assert masking.density == masking.exploration_rate == 1


def test_training_with_all_weights_active_is_dense_training():
    dense, model = mlp(6, 5, 4), mlp(6, 5, 4)
    model.load_state_dict(dense.state_dict())
    masking = masked(model, density=1.0)
    optimizer = sgd(dense)
    for _ in range(4):
        inputs = torch.randn(8, 6)
        train(dense, optimizer, 1, inputs)
        train(model, masking, 1, inputs)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))


def test_masks_are_bool_and_nothing_changes_its_storage():
    # Release 1.0 gave weights new storage at every step.
    model = mlp(20, 30, 10)
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    masking = masked(model)
    masks = [mask.data_ptr() for mask in masking.masks.values()]
    for _ in range(3):
        train(model, masking)
        masking.at_end_of_epoch()
    assert [(parameter, parameter.data_ptr()) for parameter in model.parameters()] == before
    assert [mask.data_ptr() for mask in masking.masks.values()] == masks
    assert {mask.dtype for mask in masking.masks.values()} == {torch.bool}


def test_gradients_of_inactive_weights_are_left_alone():
    model = mlp(20, 30, 10)
    masking = masked(model)
    backward(model)
    masking.step()
    inactive = ~masking.masks["fc1.weight"]
    assert (model.fc1.weight.grad[inactive] != 0).any()
    assert (masking.get_momentum_for_weight(model.fc1.weight)[inactive] != 0).any()


def test_loading_the_optimizer_keeps_the_masks_on():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking)
    masking.optimizer.load_state_dict(copy.deepcopy(masking.optimizer.state_dict()))
    train(model, masking.optimizer)
    assert masking.steps == 6
    assert_masks_hold(masking)


def test_a_weight_without_gradient_is_kept_at_its_masks():
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    masking = masked(model, density=0.5)
    train(model[0], masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 36
    assert_masks_hold(masking)


@pytest.mark.long
def test_a_thousand_layers():
    model = nn.ModuleList(nn.Linear(4, 5, bias=False) for _ in range(1000))
    masking = masked(model, density=0.1)
    assert masking.total_nonzero == 2000
    for _ in range(3):
        for layer in masking.layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        masking.step()
        masking.at_end_of_epoch()
        masking.check()
    assert all(layer.nonzeros for layer in masking.layers)
    assert masking.total_nonzero == 2000


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["step", "optimizer step", "update", "save", "load", "remove", "print"]), max_size=15),
    st.sampled_from([0.02, 0.3, 0.9, 1.0]),
)
def test_operations_in_any_order_keep_counts_and_zeros(operations, density):
    model = mlp(12, 10, 8, 4)
    masking = masked(model, density=density, growth_mode="random", redistribution_mode="magnitude")
    saved, steps = None, 0
    for operation in operations:
        if operation == "step":
            train(model, masking, 1)
        elif operation == "optimizer step":
            train(model, masking.optimizer, 1)
        elif operation == "update":
            masking.at_end_of_epoch()
        elif operation == "save":
            saved, saved_steps = copy.deepcopy(masking.state_dict()), steps
        elif operation == "load" and saved and saved["layers"].keys() == masking.masks.keys():
            masking.load_state_dict(saved)
            steps = saved_steps
        elif operation == "remove" and len(masking.layers) > 1:
            masking.remove_weight(masking.layers[0].name)
        elif operation == "print":
            masking.print_nonzero_counts()
        steps += "step" in operation
        assert_masks_hold(masking)
        assert masking.total_nonzero == masking.baseline_nonzero
        assert masking.steps == steps


# The optimizer's methods


class Narrow:
    """An old optimizer wrapper, whose methods take no arguments."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.cleared = 0

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.cleared += 1
        self.optimizer.zero_grad()


def test_an_optimizer_wrapper_without_optional_arguments_works():
    model = mlp(6, 5)
    wrapper = Narrow(sgd(model))
    masking = masked(model, wrapper)
    train(model, masking, 1)
    masking.zero_grad()
    assert (masking.steps, wrapper.cleared) == (1, 1)


def test_gradients_are_cleared_or_zero():
    model = mlp(6, 5)
    masking = masked(model)
    train(model, masking, 1)
    masking.zero_grad(set_to_none=False)
    assert not model.fc1.weight.grad.any()
    masking.zero_grad()
    assert model.fc1.weight.grad is None


# What is on and off


def of_method(model, **settings):
    return Masking.from_method("set", model, sgd(model), 10, **settings)


def of_modes(model, **settings):
    masking = Masking(sgd(model), None, redistribution_mode="nonzeros", **settings)
    masking.add_module(model, 0.05)
    return masking


@pytest.mark.parametrize("make", [of_modes, of_method])
def test_what_is_not_asked_for_is_off(make, caplog):
    caplog.set_level(logging.INFO, logger="sparselearning")
    masking = make(nn.Sequential(nn.Embedding(20, 10), nn.Linear(10, 30), nn.Linear(30, 5)))
    assert list(masking.masks) == ["1.weight", "2.weight"]
    assert masking.total_nonzero == masking.baseline_nonzero == round(0.05 * 450)
    held = masking.held
    assert (held.kind, held.regrown, held.reset_state, held.pull) == ("zero", "zero", False, 0.0)
    assert masking.prune_threshold == 0.001
    assert masking.redistribution_mode == ("nonzeros" if make is of_modes else "none")
    assert not caplog.records


@pytest.mark.parametrize("make", [of_modes, of_method])
def test_what_is_asked_for_is_on(make, caplog):
    caplog.set_level(logging.INFO, logger="sparselearning")
    make(mlp(20, 30, 10), verbose=True)
    assert caplog.records
    with pytest.raises(RuntimeError, match="fp16=True expects"):
        make(mlp(20, 30, 10), fp16=True)
    with pytest.raises(
        ValueError, match=r"Unknown weights 'ternary'\. Choose one of 'zero', 'kept', 'soft', 'sparse'\."
    ):
        make(mlp(20, 30, 10), weights="ternary")


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match=r"Say updates=Updates\(every=k\), or prune_every_k_steps=k without updates"):
        masked(mlp(5, 5), prune_every_k_steps=3, updates=Updates(every=3))
    with pytest.raises(TypeError, match=r"Expected weights to be one of 'zero', .* got 3"):
        masked(mlp(5, 5), weights=3)
    held = Zeros(pull=0.1)
    masked(mlp(5, 5), weights=held)
    with pytest.raises(ValueError, match="This Zeros holds the weights of another Masking"):
        masked(mlp(5, 5), weights=held)
