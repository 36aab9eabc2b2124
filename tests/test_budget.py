"""How many weights each layer loses and gets, on examples small enough to count by hand."""

import itertools
import math

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train

from sparselearning import Masking
from sparselearning.functions import network_wide
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.schedules import CubicDensity, StepDensity, Updates
from sparselearning.selection import add_highest_jointly


def network(active, *widths, **modes):
    """Return a Masking on linear layers of which layer i has active[i] active weights, after one step."""
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
    masking = network([10, 30], 10, 20, 10, updates=Updates(density=lambda step: density))
    masking.at_end_of_epoch()
    assert counts(masking) == expected
    assert masking.baseline_nonzero == sum(expected)


@pytest.mark.parametrize(("density", "expected"), [(0.2, [32, 48]), (0.05, [8, 12])])
def test_blocks_are_gained_and_lost_whole(density, expected):
    model = mlp(10, 20, 10)
    modes = dict(growth_mode="random", redistribution_mode="none", prune_rate=0.0)
    masking = Masking(sgd(model), None, updates=Updates(density=lambda step: density), **modes)
    masking.add_module(model, {"fc1": 0.08, "fc2": 0.12}, pattern="block:2x2")
    train(model, masking, 1)
    with torch.no_grad():
        model.fc1.weight.mul_(100)  # larger weights keep no more of a layer
    masking.at_end_of_epoch()
    assert counts(masking) == expected


@pytest.mark.parametrize("redistribution", ["none", "momentum", "remaining"])
@pytest.mark.parametrize("prune_rate", [0.0, 0.3])
@pytest.mark.parametrize(
    "schedule", [CubicDensity(0.9, 0.1, 2, 9), CubicDensity(0.1, 0.9, 2, 9), StepDensity(0.5, 0.05, 5)]
)
def test_the_density_follows_its_schedule_to_the_weight(schedule, prune_rate, redistribution):
    model = mlp(20, 30, 10)
    masking = masked(
        model,
        density=schedule(0),
        prune_rate=prune_rate,
        redistribution_mode=redistribution,
        updates=Updates(every=1, density=schedule),
    )
    for step in range(1, 12):
        train(model, masking, 1)
        assert masking.total_nonzero == masking.baseline_nonzero == round(900 * schedule(step))
        assert_masks_hold(masking)


@pytest.mark.parametrize("prune_mode", ["threshold", "adaptive_threshold", "sign_flip", lambda _, mask, *more: mask])
def test_the_density_falls_whatever_a_function_prunes(prune_mode):
    model = mlp(20, 30, 10)
    updates = Updates(density=StepDensity(1.0, 0.5, 1))
    masking = masked(model, None, 1.0, prune_mode=prune_mode, prune_rate=0.0, updates=updates)
    train(model, masking, 1)
    smallest = torch.cat([layer.weight.abs().flatten() for layer in masking.layers]).sort().values[:400]
    masking.at_end_of_epoch()
    masking.check()
    assert masking.total_nonzero == 450
    assert masking.total_removed >= 450
    if callable(prune_mode):  # which prunes nothing: the smallest of the network go
        kept = torch.cat([layer.weight[layer.mask].abs() for layer in masking.layers])
        assert kept.min() > smallest.max()


def test_layers_fall_in_proportion_and_none_gives_each_back_what_it_lost():
    model = mlp(20, 30, 10)
    updates = Updates(density=StepDensity(1.0, 0.5, 1))
    masking = masked(model, None, 1.0, prune_rate=0.3, redistribution_mode="none", updates=updates)
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert masking.name2removed == {"fc1.weight": 300 + 90, "fc2.weight": 150 + 45}
    assert masking.name2nonzeros == {"fc1.weight": 300, "fc2.weight": 150}


# Prune rates


def test_a_nearly_dense_layer_that_still_grows_is_pruned_by_its_sparsity():
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.9, redistribution_mode=lambda masking, name, weight, mask: name == "fc2.weight")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2prune_rate == {"fc1.weight": 0.5, "fc2.weight": pytest.approx(0.1)}
    assert masking.name2removed == {"fc1.weight": 270, "fc2.weight": 27}


def test_a_nearly_dense_layer_that_is_as_important_as_the_others_is_pruned_in_full():
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.9, redistribution_mode="none")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2removed == {"fc1.weight": 270, "fc2.weight": 135}


# Importance


@pytest.mark.parametrize("none", [math.nan, -1.0, torch.tensor(math.nan)])
def test_nan_or_negative_importance_counts_as_zero(none):
    masking = network([10, 30], 10, 20, 10, redistribution_mode=lambda m, name, w, mask: none if "fc1" in name else 2.0)
    masking.at_end_of_epoch()
    assert masking.name2variance == {"fc1.weight": 0.0, "fc2.weight": 1.0}
    assert counts(masking) == [5, 35]


def test_infinite_importance_names_the_layer_and_changes_nothing():
    model = mlp(20, 30, 10)
    masking = masked(model, redistribution_mode=lambda masking, name, weight, mask: torch.inf if "fc2" in name else 1)
    train(model, masking)
    before = snapshot(masking)
    with pytest.raises(ValueError, match=r"fc2.weight has importance inf.*diverged"):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)


@pytest.mark.parametrize("redistribution_mode", ["momentum", "magnitude", "nonzeros"])
def test_an_empty_layer_is_harmless(redistribution_mode):
    model = mlp(20, 30, 10)
    with torch.no_grad():
        model.fc1.weight.zero_()
    nonzeros = {f"{name}.weight": getattr(model, name).weight != 0 for name in ("fc1", "fc2")}
    masking = masked(model, sparse_init=nonzeros, redistribution_mode=redistribution_mode)
    assert masking.name2nonzeros == {"fc1.weight": 0, "fc2.weight": 300}
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2variance == {"fc1.weight": 0, "fc2.weight": 1}
    assert masking.total_nonzero == 300
    assert_masks_hold(masking)


# What grows


def test_a_layer_is_regrown_to_at_most_99_percent_of_its_room():
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.5, redistribution_mode=lambda masking, name, weight, mask: name == "fc2.weight")
    train(model, masking)
    masking.at_end_of_epoch()  # 150 and 75 leave; the second layer's room is 225, of which 222 are filled
    assert masking.name2removed == {"fc1.weight": 150, "fc2.weight": 75}
    assert masking.name2nonzeros == {"fc1.weight": 150 + 3, "fc2.weight": 75 + 222}
    assert masking.total_nonzero == 450


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


@pytest.mark.parametrize("redistribution", ["momentum", "magnitude", "nonzeros", "none"])
def test_no_layer_loses_its_last_weight(redistribution):
    model = mlp(10, 10, 10, 10)
    masking = masked(model, density=0.04, prune_rate=0.9, redistribution_mode=redistribution)
    for _ in range(10):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        assert masking.total_nonzero == 12
        assert all(layer.nonzeros for layer in masking.layers)


def nothing(masking, mask, weight, name):
    return torch.zeros_like(mask)


@network_wide
def never_to_fc2(masking, total_regrowth):
    others = {name: mask for name, mask in masking.masks.items() if name != "fc2.weight"}
    scores = [torch.rand_like(mask, dtype=torch.float) for mask in others.values()]
    grown = add_highest_jointly(scores, list(others.values()), total_regrowth)
    return masking.masks | dict(zip(others, grown, strict=True))


SCHEDULES = {
    "constant": (0.03, None),
    "to 2%": (0.6, CubicDensity(0.6, 0.02, 1, 4)),
    "to 1% at once": (0.5, StepDensity(0.5, 0.01, 2)),
    "up": (0.03, CubicDensity(0.03, 0.5, 1, 4)),
}
KEPT = {"dense_magnitude", "global_dense_magnitude"}


REDISTRIBUTIONS = [*REDISTRIBUTION_FUNCTIONS, to_fc2]
GROWTHS = ["random", "momentum", "global_momentum", "dense_magnitude", never_to_fc2]
MODES = [*itertools.product([0.0, 0.7], [*PRUNE_FUNCTIONS, nothing], GROWTHS, SCHEDULES)]
MODES = [(*modes, REDISTRIBUTIONS[i % len(REDISTRIBUTIONS)]) for i, modes in enumerate(MODES)]


@pytest.mark.parametrize(("prune_rate", "prune", "growth", "schedule", "redistribution"), MODES)
def test_no_layer_is_emptied_by_any_mode_or_schedule(prune_rate, prune, growth, schedule, redistribution):
    """The weights of the second layer are so small that a comparison over the network would take all of them."""
    model = mlp(10, 20, 5, 10)
    with torch.no_grad():
        model.fc2.weight.mul_(1e-3)
    start, density = SCHEDULES[schedule]
    masking = masked(
        model,
        sgd(model, lr=1e-4),
        start,
        weights="kept" if {prune, growth} & KEPT else "zero",
        **dict(prune_mode=prune, growth_mode=growth, redistribution_mode=redistribution, prune_rate=prune_rate),
        updates=Updates(every=1, density=density),
    )
    masking.prune_threshold = 0.1
    for step in range(1, 7):
        train(model, masking, 1)
        assert all(layer.nonzeros for layer in masking.layers)
        assert masking.total_nonzero == round(350 * (density(step) if density else start))
        assert_masks_hold(masking)


@pytest.mark.parametrize("method", ["gmp", "one_shot"])
@pytest.mark.parametrize("prune", ["magnitude", "global_magnitude"])
def test_methods_that_prune_a_dense_network_leave_a_weight_in_every_layer(method, prune):
    model = mlp(200, 20, 2, 2)
    often = dict(prune_every_k_steps=1) if method == "gmp" else {}
    masking = Masking.from_method(method, model, sgd(model), total_steps=8, density=0.005, prune=prune, **often)
    train(model, masking, 8)
    assert masking.total_nonzero == round(0.005 * 4044)
    assert min(counts(masking)) > 0


def test_an_emptied_layer_keeps_its_largest_weight_and_the_smallest_of_the_others_leaves():
    model = mlp(3, 1, 3)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.1, -0.3, 0.2]]))
        model.fc2.weight.copy_(torch.tensor([[5.0], [-6.0], [4.0]]))
    modes = dict(prune_mode="global_magnitude", growth_mode="random", prune_rate=0.0)
    masking = masked(model, None, 1.0, **modes, updates=Updates(density=StepDensity(1.0, 0.5, 0)))
    masking.at_end_of_epoch()
    assert [mask.flatten().tolist() for mask in masking.masks.values()] == [[False, True, False], [True, True, False]]


def test_blocks_that_a_layer_keeps_are_whole():
    model = mlp(8, 8, 8)
    with torch.no_grad():
        model.fc1.weight.mul_(1e-3)
    modes = dict(prune_mode="global_magnitude", growth_mode="random", prune_rate=0.0, pattern="block:2x2")
    masking = masked(model, None, 1.0, **modes, updates=Updates(density=StepDensity(1.0, 0.25, 0)))
    masking.at_end_of_epoch()
    assert counts(masking) == [4, 28]
    assert all(layer.pattern.holds(layer.mask) for layer in masking.layers)


def test_a_density_that_leaves_less_than_a_weight_for_each_layer_warns_and_leaves_one():
    masking = masked(mlp(10, 10, 10, 10), density=0.5, updates=Updates(density=StepDensity(0.5, 0.004, 0)))
    with pytest.warns(UserWarning, match="A density of 1 of 300 weights leaves less than one in each of 3 layers"):
        masking.at_end_of_epoch()
    assert counts(masking) == [1, 1, 1]


def test_layers_whose_units_differ_grow_as_many_as_they_lost():
    model = mlp(10, 20, 10)
    masking = Masking(sgd(model), None, prune_rate=0.3, growth_mode="random", redistribution_mode="none")
    masking.add_module(model.fc1, 0.4, pattern="block:2x2")
    masking.add_module(model.fc2, 0.05)
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert list(masking.name2removed.values()) == [24, 3]
    assert counts(masking) == [80, 10]


def test_the_next_update_makes_up_for_growth_that_added_too_much():
    def generous(masking, name, new_mask, total_regrowth, weight):
        return new_mask | (torch.rand_like(weight) < 2 * total_regrowth / new_mask.numel())

    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode=generous, prune_rate_decay=lambda step: 0.5 if step < 4 else 0.0)
    train(model, masking)
    masking.at_end_of_epoch()
    excess = masking.total_nonzero - masking.baseline_nonzero
    assert excess > 0
    masking.grow = GROWTH_FUNCTIONS["momentum"]
    train(model, masking)
    masking.at_end_of_epoch()  # nothing is pruned at rate 0, so nothing can be made up for
    assert masking.total_nonzero == masking.baseline_nonzero + excess
    masking.prune_rate_decay = lambda step: 0.5
    masking.at_end_of_epoch()
    assert masking.total_nonzero == masking.baseline_nonzero
