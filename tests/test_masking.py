"""Masking as its users see it: which weights are masked, names, counts, errors, state."""

import copy
import io
import logging

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, same, snapshot, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning import CosineDecay, Masking, network_wide
from sparselearning.grow import GROWTH_FUNCTIONS


def sgd(*modules, **settings):
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9} | settings))


def of_method(model, **settings):
    return Masking.from_method("set", model, sgd(model), 10, **settings)


def of_modes(model, **settings):
    masking = Masking(sgd(model), None, redistribution_mode="nonzeros", **settings)
    masking.add_module(model, 0.05)
    return masking


# The usage of the README


def test_a_training_loop_keeps_the_number_of_weights_and_moves_them():
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


def test_prune_every_k_steps_moves_the_masks_by_itself():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_every_k_steps=3)
    moved = []
    for _ in range(7):
        before = snapshot(masking)
        train(model, masking, steps=1)
        moved.append(not same(before, masking.masks))
    assert moved == [False, False, True, False, False, True, False]
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


def test_a_prune_rate_of_zero_moves_nothing():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_rate=0)
    train(model, masking)
    with torch.no_grad():
        model.fc1.weight[masking.masks["fc1.weight"]] = 0  # active zeros stay active
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert same(before, masking.masks)


def test_a_prune_rate_of_one_moves_everything():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_rate=1, density=0.1)
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2removed == {"fc1.weight": 60, "fc2.weight": 30}
    assert masking.total_removed == masking.total_nonzero == 90


@pytest.mark.parametrize("growth_mode", GROWTH_FUNCTIONS)
def test_a_full_network_stays_full(growth_mode):
    model = mlp(20, 30, 10)
    masking = masked(model, density=1.0, growth_mode=growth_mode, inactive="kept")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.density == 1


@pytest.mark.parametrize("redistribution_mode", ["momentum", "magnitude", "nonzeros"])
def test_an_empty_layer_is_harmless(redistribution_mode):
    model = mlp(20, 30, 10)
    with torch.no_grad():
        model.fc1.weight.zero_()
    masking = masked(model, sparse_init="resume", redistribution_mode=redistribution_mode)
    assert masking.name2nonzeros == {"fc1.weight": 0, "fc2.weight": 300}
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2variance == {"fc1.weight": 0, "fc2.weight": 1}
    assert masking.total_nonzero == 300
    assert_masks_hold(masking)


def test_a_layer_is_regrown_to_at_most_99_percent_of_its_room():
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.5, redistribution_mode=lambda masking, name, weight, mask: name == "fc2.weight")
    train(model, masking)
    masking.at_end_of_epoch()  # 150 and 75 leave; the second layer's room is 225, of which 222 are filled
    assert masking.name2removed == {"fc1.weight": 150, "fc2.weight": 75}
    assert masking.name2nonzeros == {"fc1.weight": 150 + 3, "fc2.weight": 75 + 222}
    assert masking.total_nonzero == 450


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


# Which weights


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
    masking.remove_type(nn.Linear)
    assert list(masking.masks) == ["0.weight"]
    masking.remove_type((nn.Conv1d, nn.Conv2d))
    assert masking.masks == {}
    assert masking.baseline_nonzero == 0
    masking.at_end_of_epoch()  # nothing to do


def test_removed_weights_train_densely():
    model = mlp(20, 30, 10)
    masking = masked(model)
    masking.remove_weight("fc2.weight")
    train(model, masking)
    assert (model.fc2.weight != 0).all()
    assert_masks_hold(masking)


@pytest.mark.parametrize("names", [["fc2"], ("fc2.weight",), "fc2"])
def test_remove_param_names_keeps_values_of_dense_layers(names):
    model = mlp(20, 30, 10)
    initial = model.fc2.weight.clone()
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.1, remove_param_names=names)
    assert list(masking.masks) == ["fc1.weight"]
    assert torch.equal(model.fc2.weight, initial)


def test_weights_the_optimizer_does_not_step_stay_dense():
    model = mlp(20, 30, 10)
    matrices, others = sgd(model.fc1), torch.optim.Adam(model.fc2.parameters())
    for optimizer, name in ((matrices, "fc1.weight"), (others, "fc2.weight")):
        masking = Masking(optimizer, None)
        masking.add_module(model, 0.1)
        assert list(masking.masks) == [name]


def test_a_module_of_another_optimizer_is_refused():
    masking = Masking(sgd(mlp(5, 5)), None)
    with pytest.raises(ValueError, match="SGD steps no weight of Sequential that could be masked"):
        masking.add_module(mlp(5, 5), 0.5)


def test_a_module_without_weights_is_refused():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="steps no weight of Sequential that could be masked"):
        masked(model)


def test_a_module_is_not_added_twice():
    model = mlp(5, 5)
    masking = masked(model)
    with pytest.raises(ValueError, match="steps no weight of Sequential that could be masked and is not yet"):
        masking.add_module(model, 0.5)


def test_two_modules_share_one_budget():
    encoder, head = mlp(20, 30), mlp(30, 10)
    masking = Masking(sgd(encoder, head), None)
    masking.add_module(encoder, 0.1)
    masking.add_module(head, 0.2)
    assert masking.name2nonzeros == {"fc1.weight": 60, "1.fc1.weight": 60}
    assert masking.baseline_nonzero == 120
    train(nn.Sequential(encoder, head), masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 120
    assert_masks_hold(masking)


def test_every_weight_has_a_name_of_its_own():
    modules = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), *(nn.Linear(4, 4) for _ in range(3))]
    masking = Masking(sgd(*modules), None)
    for module in modules:
        masking.add_module(module, 0.5)
    assert len(masking.masks) == len(masking.layers) == 6


def test_names_survive_wrappers():
    model = mlp(20, 30, 10)
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    masking = masked(wrapped)
    assert list(masking.masks) == ["fc1.weight", "fc2.weight"]
    masking.remove_weight("module._orig_mod.fc1.weight")
    assert list(masking.masks) == ["fc2.weight"]


def test_masks_are_bool_and_weights_keep_their_storage():
    model = mlp(20, 30, 10)
    before = [(parameter, parameter.data_ptr()) for parameter in model.parameters()]
    masking = masked(model)
    train(model, masking)
    masking.at_end_of_epoch()
    assert [(parameter, parameter.data_ptr()) for parameter in model.parameters()] == before
    assert {mask.dtype for mask in masking.masks.values()} == {torch.bool}


def test_different_seeds_draw_different_masks_and_equal_seeds_equal_ones():
    def draw(seed):
        torch.manual_seed(seed)
        return snapshot(masked(mlp(20, 30, 10)))

    assert same(draw(1), draw(1))
    assert not same(draw(1), draw(2))


def test_resume_takes_the_nonzeros_as_they_are():
    model = mlp(20, 30, 10)
    first = masked(model, density=0.1)
    again = masked(copy.deepcopy(model), density=0.7, sparse_init="resume")
    assert same(first.masks, again.masks)
    assert again.baseline_nonzero == 90


def test_counts_are_read_per_layer_and_in_total():
    masking = masked(mlp(20, 30, 10), density=0.1)
    assert masking.name2nonzeros == {"fc1.weight": 60, "fc2.weight": 30}
    assert masking.name2zeros == {"fc1.weight": 540, "fc2.weight": 270}
    assert (masking.total_nonzero, masking.total_zero, masking.total_removed) == (90, 810, 0)
    assert masking.density == 0.1


def test_counts_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="sparselearning"):
        masking = masked(mlp(20, 30, 10), density=0.1, verbose=True)
    assert caplog.messages == [
        "fc1.weight: 60 of 600 active, density 0.1000",
        "fc2.weight: 30 of 300 active, density 0.1000",
        "Prune rate: 0.5000. Active weights: 90.",
    ]
    masking.remove_weight("fc2.weight")


# Errors


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match=r"Expected a density in \(0, 1\], got"):
        masked(mlp(5, 5), density=density)


def test_a_density_that_leaves_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"A density of 0.001 leaves none of 25 weights"):
        masked(mlp(5, 5), density=0.001)


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("prune_mode", "'magnitude', 'SET', 'threshold', 'adaptive_threshold', 'global_magnitude'"),
        ("growth_mode", "'momentum', 'gradient', 'random', 'momentum_neuron', 'global_momentum'"),
        ("redistribution_mode", "'momentum', 'magnitude', 'nonzeros', 'nonzero', 'remaining', 'none'"),
        ("sparse_init", "'constant', 'linear', 'erdos_renyi_kernel', 'resume'"),
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


@pytest.mark.parametrize("decay", [0.3, "cosine"])
def test_a_schedule_that_cannot_be_called_is_refused(decay):
    with pytest.raises(TypeError, match=f"Expected prune_rate_decay to be a function .* got {decay!r}"):
        masked(mlp(5, 5), prune_rate_decay=decay)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_schedule_that_leaves_its_range_is_refused(rate):
    masking = masked(mlp(5, 5), prune_rate_decay=lambda step: rate)
    with pytest.raises(ValueError, match=rf"Expected a prune rate in \[0, 1\] at step 0, got {rate}"):
        masking.at_end_of_epoch()


@pytest.mark.parametrize("mode", ["growth_mode", "redistribution_mode"])
def test_an_optimizer_without_momentum_is_refused_at_the_door(mode):
    model = mlp(5, 5)
    others = {"growth_mode": "random", "redistribution_mode": "none"} | {mode: "momentum"}
    with pytest.raises(RuntimeError, match=r"SGD holds no momentum .* Use SGD\(momentum=0.9\), Adam or AdamW, or"):
        masked(model, sgd(model, momentum=0), **others)


def test_random_growth_needs_no_momentum():
    for redistribution_mode in ("nonzeros", "magnitude", "none"):
        model = mlp(20, 30, 10)
        masking = masked(model, sgd(model, momentum=0), growth_mode="random", redistribution_mode=redistribution_mode)
        train(model, masking)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)


def test_infinite_importance_names_the_layer_and_changes_nothing():
    model = mlp(20, 30, 10)
    masking = masked(model, redistribution_mode=lambda masking, name, weight, mask: torch.inf if "fc2" in name else 1)
    train(model, masking)
    before = snapshot(masking)
    with pytest.raises(ValueError, match=r"fc2.weight has importance inf.*diverged"):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)


# Functions that misbehave


def fails(masking, name, new_mask, total_regrowth, weight):
    new_mask[:] = True
    raise RuntimeError("mine")


def test_masks_are_as_before_when_a_function_fails():
    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode=fails)
    train(model, masking)
    before = snapshot(masking)
    with pytest.raises(RuntimeError, match="mine"):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)
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


def test_growth_that_grows_too_much_is_made_up_for_by_the_next_update():
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


# State


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("prune_mode", ["magnitude", "threshold"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(prune_mode):
    def build():
        model = mlp(20, 30, 10)
        optimizer = sgd(model)
        masking = Masking(optimizer, CosineDecay(0.5, 12), prune_mode=prune_mode, prune_every_k_steps=2)
        masking.add_module(model, 0.2)
        return model, optimizer, masking

    model, optimizer, masking = build()
    masking.prune_threshold = 0.003
    inputs = torch.randn(8, 20)
    train(model, masking, 5, inputs)
    saved = saved_and_loaded([model.state_dict(), optimizer.state_dict(), masking.state_dict()])
    train(model, masking, 7, inputs)

    resumed, *parts = build()
    for part, state in zip((resumed, *parts), saved, strict=True):
        part.load_state_dict(state)
    assert_masks_hold(parts[1])
    assert parts[1].steps == 5
    assert parts[1].prune_threshold == saved[2]["prune_threshold"]
    train(resumed, parts[1], 7, inputs)
    assert same(model.state_dict(), resumed.state_dict())
    assert same(masking.masks, parts[1].masks)
    for view in ("steps", "baseline_nonzero", "name2removed", "name2variance", "name2prune_rate", "prune_threshold"):
        assert getattr(masking, view) == getattr(parts[1], view)


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


def test_masks_of_another_model_are_refused_and_the_difference_named():
    masking = masked(mlp(20, 30, 10))
    before = snapshot(masking)
    state = masked(mlp(20, 31, 10, 5)).state_dict()
    with pytest.raises(RuntimeError, match="masks are of another model") as error:
        masking.load_state_dict(state)
    assert "fc1.weight: (31, 20) in the state, (30, 20) here" in str(error.value)
    assert "fc3.weight: (5, 10) in the state, absent here" in str(error.value)
    assert same(before, masking.masks)


def test_loading_the_optimizer_keeps_the_masks_on():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking)
    masking.optimizer.load_state_dict(copy.deepcopy(masking.optimizer.state_dict()))
    train(model, masking.optimizer)
    assert masking.steps == 6
    assert_masks_hold(masking)


def test_gradients_of_inactive_weights_are_left_alone():
    model = mlp(20, 30, 10)
    masking = masked(model)
    backward(model)
    masking.step()
    inactive = ~masking.masks["fc1.weight"]
    assert (model.fc1.weight.grad[inactive] != 0).any()
    assert (masking.get_momentum_for_weight(model.fc1.weight)[inactive] != 0).any()


@pytest.mark.parametrize("make", [of_modes, of_method])
def test_what_is_not_asked_for_is_off(make, caplog):
    caplog.set_level(logging.INFO, logger="sparselearning")
    masking = make(nn.Sequential(nn.Embedding(20, 10), nn.Linear(10, 30), nn.Linear(30, 5)))
    assert list(masking.masks) == ["1.weight", "2.weight"]
    assert masking.total_nonzero == masking.baseline_nonzero == round(0.05 * 450)
    assert (masking.reset_state, masking.pull, masking.prune_threshold) == (False, 0.0, 0.001)
    assert masking.redistribution_mode == ("nonzeros" if make is of_modes else "none")
    assert not caplog.records


@pytest.mark.parametrize("make", [of_modes, of_method])
def test_what_is_asked_for_is_on(make, caplog):
    caplog.set_level(logging.INFO, logger="sparselearning")
    make(mlp(20, 30, 10), verbose=True)
    assert caplog.records
    with pytest.raises(RuntimeError, match="fp16=True expects"):
        make(mlp(20, 30, 10), fp16=True)
    with pytest.raises(ValueError, match="Unknown sparse_backend 'tpu'"):
        make(mlp(20, 30, 10), sparse_backend="tpu")


def test_an_infinite_pull_is_refused():
    with pytest.raises(ValueError, match="Expected a pull of at least 0, got inf"):
        of_modes(mlp(5, 5), pull=float("inf"))
