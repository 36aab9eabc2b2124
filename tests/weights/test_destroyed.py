"""Weights of a loaded network live through the masks that are loaded with it; a loss of many is said."""

import copy
import logging

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking
from sparselearning.sparse import available

HELD = ["zero", "kept", "soft", "sparse"]


def trained(weights="zero", pattern=None, **modes):
    """Return a model that was trained sparsely, and what was saved of it."""
    if weights == "sparse" and not available():
        pytest.skip("built without sparse kernels")
    modes = dict(redistribution_mode="none") | modes
    model = mlp(20, 30, 10)
    masking = masked(model, weights=weights, pattern=pattern, **modes)
    for _ in range(2):
        train(model, masking, 3)
        masking.at_end_of_epoch()
    saved = {"model": model.state_dict(), "optimizer": masking.optimizer.state_dict(), "mask": masking.state_dict()}
    return model, masking, copy.deepcopy(saved)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("weights", HELD)
def test_a_loaded_network_keeps_its_weights_under_the_masks_that_were_saved(weights, caplog):
    model, masking, saved = trained(weights)
    torch.manual_seed(7)
    again = mlp(20, 30, 10)
    again.load_state_dict(saved["model"])
    caplog.clear()
    second = Masking(sgd(again), None, 0.5, redistribution_mode="none", weights=weights)
    second.add_module(again, state=saved["mask"])
    assert same(again.state_dict(), saved["model"])
    assert same(masking.masks, second.masks)
    assert (second.steps, second.total_nonzero, second.baseline_nonzero) == (6, 180, 180)
    assert not warnings_of(caplog)
    second.optimizer.load_state_dict(saved["optimizer"])
    inputs = torch.randn(8, 20)
    for one, other in ((model, masking), (again, second)):
        torch.manual_seed(1)
        train(one, other, 3, inputs)
        other.at_end_of_epoch()
    assert same(model.state_dict(), again.state_dict())
    assert same(masking.masks, second.masks)


def test_patterns_are_taken_from_the_state():
    model, masking, saved = trained(pattern="fan-in:0.3", prune_mode="magnitude", growth_mode="gradient")
    again = copy.deepcopy(model)
    second = Masking(sgd(again), None, redistribution_mode="none", growth_mode="gradient")
    second.add_module(again, pattern="fan-in:0.3", state=saved["mask"])
    assert same(masking.masks, second.masks)
    train(again, second, 2)
    second.at_end_of_epoch()
    second.check()


@pytest.mark.long
def test_the_state_of_two_modules_is_taken_when_the_second_is_added():
    first, second = mlp(20, 30, 10), mlp(10, 20)
    masking = Masking(sgd(first, second), None)
    for module in (first, second):
        masking.add_module(module, 0.2)
    train(nn.Sequential(first, second), masking, 4)
    state = copy.deepcopy(masking.state_dict())
    again = Masking(sgd(first, second), None)
    again.add_module(first, state=state)
    assert again.steps == 0
    again.add_module(second, state=state)
    assert again.steps == 4
    assert all(torch.equal(again.masks[name], entry["mask"]) for name, entry in state["layers"].items())


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    _, _, saved = trained()
    model = mlp(20, 31, 10)
    before = copy.deepcopy(model.state_dict())
    masking = Masking(sgd(model), None)
    with pytest.raises(RuntimeError, match=r"The masks are of another model\. fc1\.weight: \(30, 20\) in the state"):
        masking.add_module(model, state=saved["mask"])
    deeper = mlp(20, 30, 10, 5)
    with pytest.raises(RuntimeError, match=r"fc3\.weight: absent in the state"):
        Masking(sgd(deeper), None).add_module(deeper, state=saved["mask"])
    with pytest.raises(RuntimeError, match="The entry 'mask' of the state is damaged"):
        masking.add_module(model, state={"masks": {}})
    assert same(model.state_dict(), before)
    assert masking.layers == []


def test_neither_a_density_nor_a_state_is_refused():
    with pytest.raises(ValueError, match=r"Expected a density in \(0, 1\], got None"):
        Masking(sgd(model := mlp(20, 30)), None).add_module(model)


# What is said


def test_new_masks_on_a_loaded_sparse_network_are_said(caplog):
    _, _, saved = trained()
    model = mlp(20, 30, 10)
    model.load_state_dict(saved["model"])
    caplog.clear()
    masked(model)
    (message,) = warnings_of(caplog)
    assert (
        "nonzero weights to zero, of a network that looks trained. To go on with its own masks: add_module(" in message
    )


@pytest.mark.parametrize("sign", ["momentum", "statistics"])
def test_new_masks_on_a_trained_dense_network_are_said(sign, caplog):
    model = mlp(20, 30, 10)
    if sign == "statistics":
        model.append(nn.BatchNorm1d(10))
    optimizer = sgd(model)
    for _ in range(2):
        backward(model)
        if sign == "momentum":
            optimizer.step()
    masked(model, optimizer)
    assert len(warnings_of(caplog)) == 1


def test_masks_of_another_checkpoint_are_said(caplog):
    model, _, _ = trained()
    torch.manual_seed(5)
    _, _, other = trained()
    caplog.clear()
    second = Masking(sgd(model), None)
    second.add_module(model, state=other["mask"])
    assert "of a network that looks trained" in caplog.text


@pytest.mark.parametrize("sparse_init", ["constant", "resume", "masks", "scores"])
def test_a_fresh_network_and_masks_that_are_chosen_are_not_mentioned(sparse_init, caplog):
    model = mlp(20, 30, 10)
    if sparse_init != "constant":
        model, masking, _ = trained()
        scores = {name: weight.abs() for name, weight in model.named_parameters() if name in masking.masks}
        given = {"resume": "resume", "masks": snapshot(masking), "scores": scores}[sparse_init]
        masking.release()
    else:
        given = "constant"
    caplog.clear()
    nonzero = sum(int(layer.weight.count_nonzero()) for layer in (model.fc1, model.fc2))
    masked(model, density=nonzero / 900 if given == "resume" else 0.1, sparse_init=given)
    assert not [message for message in warnings_of(caplog) if "looks trained" in message]


@pytest.mark.parametrize("weights", ["zero", "sparse"])
def test_a_step_that_destroys_a_loaded_network_says_so(weights, caplog):
    _, _, saved = trained(weights)
    torch.manual_seed(7)
    model = mlp(20, 30, 10)
    masking = masked(model, weights=weights)
    model.load_state_dict(saved["model"])
    caplog.clear()
    train(model, masking, 3)
    (message,) = warnings_of(caplog)
    assert message.startswith("Weights were written since the last step, and this one sets ")
    assert "nonzero weights of fc1.weight, fc2.weight to zero" in message
    assert_masks_hold(masking)


def test_weights_that_are_written_within_the_masks_are_not_mentioned(caplog):
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 2)
    own = copy.deepcopy(model.state_dict())
    model.load_state_dict({name: value / 2 for name, value in own.items()})
    model.load_state_dict(own)
    train(model, masking, 2)
    masking.load_state_dict(masking.state_dict())
    train(model, masking, 2)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("weights", ["kept", "soft"])
def test_weights_that_are_kept_are_not_lost(weights, caplog):
    model = mlp(20, 30, 10)
    dense = copy.deepcopy(model.state_dict())
    masking = masked(model, weights=weights)
    train(model, masking, 1)
    model.load_state_dict(dense)
    train(model, masking, 1)
    assert not warnings_of(caplog)


def test_a_loop_that_writes_weights_in_every_step_is_looked_at_a_few_times():
    model = mlp(20, 30, 10)
    masking = masked(model)
    for _ in range(12):
        with torch.no_grad():
            model.fc1.weight.clamp_(-1, 1)
        train(model, masking, 1)
    assert masking.looks_left == 0
    masking.at_end_of_epoch()
    assert masking.looks_left == 10
