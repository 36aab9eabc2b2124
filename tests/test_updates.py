"""One update, by hand: who gets which weights, and what is refused; small enough to count on fingers."""

import functools
import math

import pytest
import torch
from helpers import layer_with, masked, mlp, snapshot, train
from torch import nn

from sparselearning import Masking, network_wide
from sparselearning.functions import FunctionError
from sparselearning.invariants import NonFiniteError
from sparselearning.selection import add_highest, drop_lowest


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | settings))


def network(active, *widths, **modes):
    """A network whose first layer has so many active weights, its second so many, ..."""
    model = mlp(*widths)
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for mask, count in zip(masks.values(), active, strict=True):
        mask.view(-1)[:count] = True
    modes = {"growth_mode": "random", "prune_rate": 0.5, "redistribution_mode": "none"} | modes
    masking = masked(model, sparse_init=masks, **modes)
    train(model, masking, 1)
    return masking


def counts(masking):
    return list(masking.name2nonzeros.values())


def drop_all_of_fc1(masking, mask, weight, name):
    return torch.zeros_like(mask) if name == "fc1.weight" else mask


def to_fc2(masking, name, weight, mask):
    return float(name == "fc2.weight")


# The density


@pytest.mark.parametrize(
    ("density", "expected"), [(0.2, [20, 60]), (0.05, [5, 15]), (0.1, [10, 30]), (1.0, [200, 200])]
)
def test_layers_gain_and_lose_in_proportion_to_what_they_have(density, expected):
    masking = network([10, 30], 10, 20, 10, density_schedule=lambda step: density)
    masking.at_end_of_epoch()
    assert counts(masking) == expected
    assert masking.baseline_nonzero == sum(expected)


@pytest.mark.parametrize(("density", "expected"), [(0.2, [32, 48]), (0.05, [8, 12])])
def test_blocks_are_gained_and_lost_whole(density, expected):
    model = mlp(10, 20, 10)
    modes = dict(growth_mode="random", redistribution_mode="none", prune_rate=0.0)
    masking = Masking(sgd(model), None, density_schedule=lambda step: density, **modes)
    masking.add_module(model, {"fc1": 0.08, "fc2": 0.12}, pattern="block:2x2")
    train(model, masking, 1)
    with torch.no_grad():
        model.fc1.weight.mul_(100)  # larger weights keep no more of a layer
    masking.at_end_of_epoch()
    assert counts(masking) == expected


@pytest.mark.parametrize("density", [0.0, 1.5, math.nan])
def test_a_density_that_is_none_is_refused(density):
    masking = network([10, 30], 10, 20, 10, density_schedule=lambda step: density)
    before = counts(masking)
    with pytest.raises(ValueError, match=r"Expected a density in \(0, 1\] at step 1, got"):
        masking.at_end_of_epoch()
    assert counts(masking) == before


def test_the_last_update_comes_once():
    model = mlp(10, 20, 10)
    masking = masked(model, growth_mode="random", last_update=2)
    train(model, masking, 2)  # arrives
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert all(torch.equal(mask, before[name]) for name, mask in masking.masks.items())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(prune_every_k_steps=3), [(3, True), (2, True), (1, True), (3, True)]),
        (dict(prune_every_k_steps=1), [(1, True)] * 4),
        (dict(last_update=2), [(2, False), (1, False), (math.inf, False), (math.inf, False)]),
        (dict(prune_every_k_steps=3, last_update=2), [(2, True), (1, True), (1, True), (3, True)]),
        ({}, [(math.inf, False)] * 4),
    ],
)
def test_the_next_update_is_foreseen(settings, expected):
    model = mlp(4, 4)
    masking = masked(model, growth_mode="random", **settings)
    foreseen = [masking._update_ahead()]
    for _ in range(3):
        train(model, masking, 1)
        foreseen.append(masking._update_ahead())
    assert foreseen == expected


# Which layer


@pytest.mark.parametrize("none", [math.nan, -1.0, torch.tensor(math.nan)])
def test_importance_that_is_no_number_or_negative_counts_as_none(none):
    masking = network([10, 30], 10, 20, 10, redistribution_mode=lambda m, name, w, mask: none if "fc1" in name else 2.0)
    masking.at_end_of_epoch()
    assert masking.name2variance == {"fc1.weight": 0.0, "fc2.weight": 1.0}
    assert counts(masking) == [5, 35]


@pytest.mark.parametrize(
    ("importance", "came"),
    [("much", "'much'"), (None, "None"), (torch.ones(2), r"a tensor of shape \(2,\)"), (torch.ones(0), r"a tensor of")],
)
def test_importance_of_another_kind_is_refused(importance, came):
    masking = network([10, 30], 10, 20, 10, redistribution_mode=lambda *_: importance)
    with pytest.raises(FunctionError, match=rf"importance of fc1.weight, a number or a 0-d tensor, got {came}"):
        masking.at_end_of_epoch()


@pytest.mark.parametrize("count", [1, 2, 10])
def test_a_layer_that_lost_all_gets_one_back(count):
    masking = network([count, 30], 10, 20, 10, prune_mode=drop_all_of_fc1, redistribution_mode=to_fc2)
    masking.at_end_of_epoch()
    assert counts(masking) == [1, 29 + count]


def test_a_layer_of_one_weight_that_lost_it_gets_it_back():
    masking = network([1, 3], 1, 1, 5, prune_mode=drop_all_of_fc1, redistribution_mode=to_fc2)
    masking.at_end_of_epoch()
    assert counts(masking) == [1, 3]


def test_a_layer_that_was_given_empty_stays_empty():
    masking = network([0, 30], 10, 20, 10, redistribution_mode=to_fc2)
    masking.at_end_of_epoch()
    assert counts(masking) == [0, 30]


def test_layers_whose_units_differ_grow_as_many_as_they_lost():
    model = mlp(10, 20, 10)
    masking = Masking(sgd(model), None, prune_rate=0.3, growth_mode="random", redistribution_mode="none")
    masking.add_module(model.fc1, 0.4, pattern="block:2x2")
    masking.add_module(model.fc2, 0.05)
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert list(masking.name2removed.values()) == [24, 3]
    assert counts(masking) == [80, 10]


def two_kinds(**modes):
    model = mlp(10, 20, 10)
    masking = Masking(sgd(model), None, growth_mode="random", **modes)
    masking.add_module(model.fc1, 0.4, pattern="block:2x2")
    masking.add_module(model.fc2, 0.05)


def test_units_of_two_sizes_are_refused_where_they_would_move():
    with pytest.raises(ValueError, match=r"The units of pattern 'block:2x2' have 1, 4 weights in different layers"):
        two_kinds(redistribution_mode="momentum")
    with pytest.raises(ValueError, match=r"The pattern 'block:2x2' keeps the density of each layer"):
        two_kinds(redistribution_mode="none", density_schedule=lambda step: 0.1)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ("fan-in", dict(density_schedule=lambda step: 0.1), "The pattern 'fan-in' keeps the density of each layer"),
        ("block:1x2", dict(prune_mode="sign_flip"), "prune_mode='sign_flip' moves single weights"),
        ("2:4", dict(growth_mode="momentum_neuron"), "growth_mode='momentum_neuron' moves single weights"),
    ],
)
def test_what_a_pattern_cannot_do_is_refused_at_the_door(pattern, settings, message):
    model = mlp(8, 4)
    masking = Masking(sgd(model), None, **{"growth_mode": "random", "redistribution_mode": "none"} | settings)
    with pytest.raises(ValueError, match=message):
        masking.add_module(model, 0.25, pattern=pattern)
    assert masking.layers == []


# Functions of a user


def half_of_a_block(masking, mask, weight, name):
    mask = mask.clone()
    mask[0] = False
    return mask


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_function_that_breaks_a_pattern_is_named(wrapped):
    mode = functools.partial(half_of_a_block) if wrapped else half_of_a_block
    model = mlp(4, 4)
    masking = Masking(sgd(model), None, prune_mode=mode, growth_mode="random", redistribution_mode="none")
    masking.add_module(model, 1.0, pattern="block:2x2")
    with pytest.raises(FunctionError) as refused:
        masking.at_end_of_epoch()
    named = "functools.partial(<function half_of_a_block" if wrapped else "'half_of_a_block'"
    assert str(refused.value).startswith(f"prune_mode={named}")
    assert "does not keep the pattern 'block:2x2' of fc1.weight" in str(refused.value)


def test_every_gradient_that_is_read_is_looked_at():
    @network_wide
    def grow(masking, total):
        for layer in masking.layers:
            masking.get_gradient_for_weight(layer.weight)
        return masking.masks

    masking = network([10, 30], 10, 20, 10, growth_mode=grow)
    masking.layers[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as refused:
        masking.at_end_of_epoch()
    assert "gradient of fc1.weight" in str(refused.value)
    assert "fc2" not in str(refused.value)


def test_an_update_with_functions_of_ones_own():
    """The smallest two leave, the largest two momenta come."""
    masking = layer_with(
        [[4.0, -1.0, 0.0, 0.0], [3.0, -2.0, 0.0, 0.0]],
        mask=[[True, True, False, False]] * 2,
        momentum=[[0.0, 0.0, 1.0, -5.0], [0.0, 0.0, 4.0, 2.0]],
        prune_mode=lambda masking, mask, weight, name: drop_lowest(weight.abs(), mask, 2),
        growth_mode=lambda masking, name, mask, count, weight: add_highest(
            masking.get_momentum_for_weight(weight).abs(), mask, count
        ),
    )
    masking.at_end_of_epoch()
    assert masking.masks["weight"].tolist() == [[True, False, False, True], [True, False, True, False]]


# Which weights, and what is read of them


def test_a_container_holds_no_weights_of_its_own():
    masking = masked(nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 6))), density=0.5)
    masking.remove_type(nn.Sequential)
    assert list(masking.masks) == ["0.weight", "1.0.weight"]


def test_one_weight_that_is_active_is_all_there_are():
    masking = masked(nn.Linear(1, 1), density=1.0)
    assert masking.density == masking.exploration_rate == 1.0


def test_what_the_network_is_moved_to_has_the_masks():
    model = mlp(8, 4)
    masking = Masking(sgd(model), None, growth_mode="random", redistribution_mode="none")
    masking.add_module(model, 0.5, pattern="2:4")
    layer = masking.layers[0]
    layer.memory["mine"] = torch.ones(3)
    pattern = layer.pattern
    layer.weight = layer.weight.to("meta")  # the one other device that every machine has
    masking._follow_devices()
    assert {part.device.type for part in (layer.mask, layer.ever_active, layer.memory["mine"])} == {"meta"}
    assert layer.mask.shape == (4, 8)
    assert layer.pattern == pattern


# The optimizer's methods


class Narrow:
    """An optimizer wrapper as old ones are: methods without arguments."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.cleared = 0

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.cleared += 1
        self.optimizer.zero_grad()


def test_a_wrapper_whose_methods_take_nothing():
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


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_would_see_the_dense_copy(by_name):
    model = mlp(6, 5)
    masking = masked(model, growth_mode="random", redistribution_mode="none", inactive="kept")
    with pytest.raises(RuntimeError, match="a closure would see the dense"):
        masking.optimizer.step(**{"closure": lambda: 1.0}) if by_name else masking.optimizer.step(lambda: 1.0)


def test_the_pull_is_as_strong_under_a_gradient_scaler():
    weights = []
    for scale in (1.0, 8.0):
        torch.manual_seed(4)
        model = mlp(6, 5)
        optimizer = sgd(model, fused=True)
        masked(model, optimizer, density=0.5, pull=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
        scaler.step(optimizer)
        weights.append(model.fc1.weight.detach())
    assert torch.equal(*weights)


# What is loaded


def test_a_state_of_the_first_format_knows_no_history():
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


def test_only_differences_are_named():
    with pytest.raises(RuntimeError) as refused:
        masked(mlp(6, 5, 4)).load_state_dict(masked(mlp(6, 5, 3)).state_dict())
    assert "fc2.weight: (3, 5) in the state, (4, 5) here" in str(refused.value)
    assert "fc1" not in str(refused.value)
