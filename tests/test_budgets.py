"""Budgets: the layers of each pattern of add_module(density={...}) exchange weights among themselves alone."""

import copy
import itertools

import pytest
import torch
from by_method import optimizer_of
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train

from sparselearning import Masking, Updates
from sparselearning.functions import network_wide
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.invariants import InvariantError
from sparselearning.methods import METHODS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.schedules import CubicDensity, StepDensity
from sparselearning.sparse import available

DENSITIES = {"fc1": 0.9, "fc[23]": 0.2, "*": 0.3}
COUNTS = [270, 75, 15]  # of 300, 375 and 50 weights


def network():
    return mlp(20, 15, 15, 10, 5)


def counts(masking):
    """Return the active weights of each budget."""
    return [sum(layer.nonzeros for layer in masking.layers if layer.budget is budget) for budget in masking.budgets]


def test_densities_by_layer_last_under_the_default_redistribution():
    model = network()
    masking = masked(model, density=DENSITIES)
    assert [budget.pattern for budget in masking.budgets] == [*DENSITIES]
    for _ in range(4):
        train(model, masking)
        masking.at_end_of_epoch()
        assert counts(masking) == COUNTS
        assert_masks_hold(masking)
        masking.check()
    assert masking.densities["fc1.weight"] == 0.9


def test_weights_move_among_the_layers_of_one_pattern():
    model = network()
    masking = masked(model, density=DENSITIES, redistribution_mode=lambda m, name, weight, mask: name == "fc2.weight")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2nonzeros == {"fc1.weight": 270, "fc2.weight": 60, "fc3.weight": 15, "fc4.weight": 15}
    assert counts(masking) == COUNTS


REDISTRIBUTIONS = [*REDISTRIBUTION_FUNCTIONS]
MODES = [*itertools.product(PRUNE_FUNCTIONS, GROWTH_FUNCTIONS)]
MODES = [(prune, REDISTRIBUTIONS[i % len(REDISTRIBUTIONS)], growth) for i, (prune, growth) in enumerate(MODES)]


@pytest.mark.parametrize(("prune", "redistribution", "growth"), MODES)
def test_every_function_keeps_every_budget(prune, redistribution, growth):
    model, kept = network(), "dense_magnitude" in prune + growth
    modes = dict(prune_mode=prune, redistribution_mode=redistribution, growth_mode=growth)
    masking = masked(model, density=DENSITIES, weights="kept" if kept else "zero", **modes)
    for _ in range(2):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        assert counts(masking) == COUNTS
    masking.check()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_with_the_density_of_each_pattern(method):
    model = network()
    often = {} if METHODS[method].stop_fraction == METHODS[method].start_fraction else dict(prune_every_k_steps=2)
    batches, optimizer = [(torch.randn(8, 20), torch.randint(5, (8,)))], optimizer_of(method, model.parameters())
    masking = Masking.from_method(method, model, optimizer, 12, DENSITIES, batches=batches, **often)
    train(model, masking, 12)
    masking.at_end_of_epoch()
    left_over = sum(layer.left_over for layer in masking.layers)
    steps = [layer.pattern.step(layer.mask.shape) if layer.pattern.even else 1 for layer in masking.layers]
    assert all(abs(a - b) <= max(steps) + left_over for a, b in zip(counts(masking), COUNTS, strict=True))
    assert method == "srigl" or counts(masking) == COUNTS
    masking.check()


def test_a_number_and_a_single_pattern_move_masks_alike():
    """A network with one density takes the path it took before there were budgets."""
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    maskings = []
    for model, density in zip(models, (0.3, {"*": 0.3}), strict=True):
        torch.manual_seed(1)
        maskings.append(masked(model, density=density))
        for _ in range(3):
            train(model, maskings[-1])
            maskings[-1].at_end_of_epoch()
    assert same(maskings[0].masks, maskings[1].masks)
    assert maskings[0].state_dict().keys() == maskings[1].state_dict().keys()


@network_wide
def prune_half_of_what_is_here(masking):
    here.append(list(masking.masks))
    return {layer.name: layer.mask & (torch.rand(layer.mask.shape) < 0.5) for layer in masking.layers}


here: list = []


def test_functions_for_the_network_see_one_budget_at_a_time():
    model = network()
    masking = masked(model, density=DENSITIES, prune_mode=prune_half_of_what_is_here)
    train(model, masking, 1)
    here.clear()
    masking.at_end_of_epoch()
    assert here == [["fc1.weight"], ["fc2.weight", "fc3.weight"], ["fc4.weight"]]
    assert list(masking.masks) == ["fc1.weight", "fc2.weight", "fc3.weight", "fc4.weight"]
    assert counts(masking) == COUNTS


def test_a_function_that_fails_in_the_second_budget_leaves_all_masks_as_they_were():
    def fail(masking, mask, weight, name):
        if name == "fc2.weight":
            raise ZeroDivisionError
        return torch.zeros_like(mask)

    model = network()
    masking = masked(model, density=DENSITIES, prune_mode=fail, updates=Updates(density=StepDensity(0.5, 0.1, 0)))
    train(model, masking, 1)
    before = snapshot(masking)
    with pytest.raises(ZeroDivisionError):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)
    assert [budget.nonzeros for budget in masking.budgets] == counts(masking) == COUNTS


# Densities that change


def test_a_schedule_of_the_network_keeps_the_proportions_of_budgets():
    model = network()
    masking = masked(model, density=DENSITIES, updates=Updates(density=StepDensity(0.5, 180 / 725, 1)))
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 180
    assert counts(masking) == [135, 37, 8]  # 37.5 and 7.5: the largest remainder, layer by layer


def test_each_pattern_may_have_a_schedule():
    model = network()
    schedules = {"fc1": CubicDensity(0.9, 0.1, 1, 5), "fc[23]": CubicDensity(0.2, 0.6, 1, 5)}
    masking = masked(model, density=DENSITIES, updates=Updates(every=1, density=schedules))
    for step in range(1, 7):
        train(model, masking, 1)
        expected = [round(schedules["fc1"](step) * 300), round(schedules["fc[23]"](step) * 375), 15]
        assert counts(masking) == [budget.nonzeros for budget in masking.budgets] == expected
        masking.check()


def test_a_schedule_of_a_pattern_that_is_none_is_refused():
    model = network()
    masking = masked(model, density=0.5, updates=Updates(density={"conv*": StepDensity(0.5, 0.1, 1)}))
    train(model, masking, 1)
    with pytest.raises(ValueError, match=r"schedule is for 'conv\*', and add_module was given densities for '\*'"):
        masking.at_end_of_epoch()
    with pytest.raises(TypeError, match=r"function of the step.*got 0\.5"):
        Updates(density={"fc1": 0.5})


def test_a_pattern_denser_than_the_start_of_a_method_begins_with_its_own_density():
    masking = Masking.from_method("granet", (model := network()), sgd(model), 100, DENSITIES)
    assert counts(masking) == [270, 188, 25]  # GraNet begins with 0.5


# Saving


def test_a_resumed_run_goes_on_with_the_budgets_it_had():
    models = [network(), network()]
    with torch.no_grad():
        models[0].fc1.weight.mul_(0.01)
    modes = dict(density=DENSITIES, prune_mode="adaptive_threshold", prune_rate=0.3)
    first, second = [masked(model, **modes) for model in models]
    for _ in range(3):
        train(models[0], first)
        first.at_end_of_epoch()
    models[1].load_state_dict(models[0].state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    thresholds = [budget.prune_threshold for budget in first.budgets]
    assert thresholds == [budget.prune_threshold for budget in second.budgets]
    assert len(set(thresholds)) > 1, "each budget has a threshold of its own"
    for model, masking in zip(models, (first, second), strict=True):
        torch.manual_seed(2)
        train(model, masking)
        masking.at_end_of_epoch()
        assert counts(masking) == COUNTS
    assert same(first.masks, second.masks)


def test_masks_of_other_budgets_and_damaged_budgets_are_refused():
    masking = masked(network(), density=DENSITIES)
    state = masking.state_dict()
    message = r"saved with densities for 'fc1', 'fc\[23\]', '\*', and are loaded with densities for '\*'"
    with pytest.raises(RuntimeError, match=message):
        masked(network(), density=0.3).load_state_dict(state)
    for change, words in [
        (dict(nonzeros=-1), r"'budgets'\[0\]\['nonzeros'\] .* got -1"),
        (dict(nonzeros=3), r"'budgets' .* expected 360 weights in all"),
        (dict(prune_threshold=float("nan")), "'prune_threshold'"),
        (dict(pattern="fc2"), "saved with densities for 'fc2'"),
    ]:
        damaged = copy.deepcopy(state)
        damaged["budgets"][0] |= change
        with pytest.raises(RuntimeError, match=words):
            masking.load_state_dict(damaged)
    assert counts(masking) == COUNTS


def test_a_state_of_before_there_were_budgets_gives_them_its_counts():
    masking = masked(network(), density=DENSITIES)
    state = masking.state_dict()
    del state["budgets"]
    other = masked(network(), density={"fc1": 0.5, "fc[23]": 0.5, "*": 0.5})
    other.load_state_dict(state)
    assert [budget.nonzeros for budget in other.budgets] == COUNTS
    other.check()


# Several modules


def test_numbers_share_a_budget_and_patterns_have_their_own():
    first, second, third = mlp(20, 15), mlp(20, 15), mlp(20, 15)
    masking = Masking(sgd(first, second, third), None)
    masking.add_module(first, 0.1)
    masking.add_module(second, 0.3)
    masking.add_module(third, {"*": 0.5})
    assert counts(masking) == [120, 150]
    assert [len(names) for names in ([*masking.masks][:2], [*masking.masks][2:])] == [2, 1]


def test_a_removed_layer_takes_its_weights_out_of_its_budget():
    masking = masked(network(), density=DENSITIES)
    masking.remove_weight("fc3")
    assert [budget.nonzeros for budget in masking.budgets] == [270, 45, 15]
    masking.remove_weight("fc1")
    assert masking.baseline_nonzero == 60
    masking.check()


def test_check_names_the_budget_that_lost_weights():
    masking = masked(network(), density=DENSITIES)
    masking.layers[1].mask[masking.layers[1].mask] = False
    masking.apply_mask()
    with pytest.raises(InvariantError, match=r"30 weights of 'fc\[23\]' are active, 75 should be"):
        masking.check()


def test_the_number_of_one_of_several_budgets_is_set_there():
    masking = masked(network(), density=DENSITIES)
    with pytest.raises(AttributeError, match=r"There are 3 budgets. Set masking.budgets\[i\].nonzeros"):
        masking.baseline_nonzero = 10
    masking.prune_threshold = 0.5
    assert {budget.prune_threshold for budget in masking.budgets} == {0.5}


def test_the_summary_has_a_sum_for_each_pattern():
    lines = [line.split() for line in masked(network(), density=DENSITIES).summary().splitlines()]
    sums = [" ".join(line) for line in lines if "all" in line]
    assert sums == [
        "all of 'fc1' 270 300 0.9000",
        "all of 'fc[23]' 75 375 0.2000",
        "all of '*' 15 50 0.3000",
    ]
    assert not [line for line in masked(network(), density=0.3).summary().splitlines() if "all of" in line]


def test_blocks_of_different_sizes_move_within_their_patterns():
    model = mlp(16, 24, 24, 24)
    masking = masked(model, density={"fc1": 0.5, "*": 0.25}, pattern="neuron", growth_mode="momentum")
    for _ in range(2):
        train(model, masking)
        masking.at_end_of_epoch()
        assert counts(masking) == [192, 288]
    with pytest.raises(ValueError, match="units of pattern 'neuron' have 16, 24 weights in different layers"):
        masked(mlp(16, 24, 24, 24), density=0.5, pattern="neuron")


def test_a_copy_has_budgets_of_its_own():
    model = network()
    masking = masked(model, density=DENSITIES)
    train(model, masking, 1)
    other, again = copy.deepcopy((model, masking))
    again.remove_weight("fc1")
    assert [budget.nonzeros for budget in masking.budgets] == COUNTS
    for network_, one in ((model, masking), (other, again)):
        train(network_, one)
        one.at_end_of_epoch()
        one.check()


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
@pytest.mark.parametrize("growth", ["momentum", "gradient", "random"])
def test_sparse_kernels_keep_every_budget(growth):
    model = network()
    masking = masked(model, density={"fc1": 0.5, "*": 0.2}, weights="sparse", growth_mode=growth)
    for _ in range(2):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert counts(masking) == [150, 85]
