"""Parts that do not train keep their masks and their weights; the others redistribute among themselves."""

import logging

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning.core import Masking
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.schedules import CubicDensity, Updates
from sparselearning.sparse import available

METHODS = {
    "sparse momentum": {},
    "SET": dict(prune_mode="SET", growth_mode="random", redistribution_mode="none"),
    "RigL": dict(growth_mode="gradient", redistribution_mode="none"),
    "momentum of the network": dict(growth_mode="global_momentum"),
    "magnitude of the network": dict(prune_mode="global_magnitude", growth_mode="gradient"),
}
by_method = pytest.mark.parametrize("modes", METHODS.values(), ids=METHODS)


class TwoHeads(nn.Module):
    """A body and two heads, of which a pass uses one."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(20, 30), nn.Linear(30, 10), nn.Linear(30, 10)
        self.used = "first"

    def forward(self, x):
        return getattr(self, self.used)(self.body(x).relu())


def kept(masking, name):
    """Return copies of a layer's mask and weight."""
    layer = next(layer for layer in masking.layers if layer.name == name)
    return layer.mask.clone(), layer.weight.detach().clone()


@by_method
def test_a_frozen_layer_keeps_its_weights_and_its_mask(modes):
    model = mlp(20, 30, 20, 10)
    masking = masked(model, **modes)
    train(model, masking, 2)
    model.fc2.requires_grad_(False)
    model.zero_grad()
    before, others = kept(masking, "fc2.weight"), snapshot(masking)
    for _ in range(4):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        masking.check()
    assert all(map(torch.equal, before, kept(masking, "fc2.weight")))
    assert not torch.equal(others["fc1.weight"], masking.masks["fc1.weight"])
    assert masking.total_nonzero == masking.baseline_nonzero == 280


@by_method
def test_a_frozen_network_loses_nothing(modes, caplog):
    caplog.set_level(logging.INFO)
    model = mlp(20, 30, 10)
    model.append(nn.Linear(10, 5))
    masking = Masking(sgd(model), None, 0.5, **modes)
    masking.add_module(model, 0.2, dense=["last"])
    model.fc1.requires_grad_(False)
    model.fc2.requires_grad_(False)
    masks, weights = snapshot(masking), [layer.weight.clone() for layer in masking.layers]
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    assert same(masks, masking.masks)
    assert all(map(torch.equal, weights, (layer.weight for layer in masking.layers)))
    assert "so that the masks stay: fc1.weight, fc2.weight" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "frozen" in masking.summary()


@by_method
@pytest.mark.parametrize("every", [0, 2])
def test_a_head_that_is_not_used_stays_as_it_was(modes, every):
    model = TwoHeads()
    masking = masked(model, prune_every_k_steps=every, **modes)
    before = kept(masking, "second.weight")
    for _ in range(3):
        train(model, masking, 4)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
    assert all(map(torch.equal, before, kept(masking, "second.weight")))
    model.used = "second"
    train(model, masking, 4)
    masking.at_end_of_epoch()
    assert not torch.equal(before[0], masking.masks["second.weight"])
    masking.check()


@by_method
def test_a_layer_that_is_dropped_in_the_last_step_does_not_stop_training(modes):
    model = TwoHeads()
    masking = masked(model, prune_every_k_steps=2, **modes)
    before = snapshot(masking)
    for step in range(8):
        model.used = ("first", "second")[step % 2]
        train(model, masking, 1)
    assert not torch.equal(before["second.weight"], masking.masks["second.weight"])
    assert masking.total_nonzero == 240
    masking.check()


def test_a_layer_that_had_a_gradient_before_is_part_of_an_update_that_reads_none():
    model = TwoHeads()
    masking = masked(model, growth_mode="random", redistribution_mode="none")
    before = snapshot(masking)
    train(model, masking, 1)
    model.used = "second"
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert not torch.equal(before["first.weight"], masking.masks["first.weight"])


@by_method
def test_a_learning_rate_of_zero_freezes_a_layer(modes):
    model = mlp(20, 30, 10)
    groups = [{"params": model.fc1.parameters(), "lr": 0.0}, {"params": model.fc2.parameters()}]
    masking = masked(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9), **modes)
    before = kept(masking, "fc1.weight")
    train(model, masking, 2)
    masking.at_end_of_epoch()
    assert all(map(torch.equal, before, kept(masking, "fc1.weight")))


def test_a_learning_rate_that_is_zero_everywhere_freezes_nothing():
    model = mlp(20, 30, 10)
    masking = masked(model)
    before = snapshot(masking)
    train(model, masking, 2)
    masking.optimizer.param_groups[0]["lr"] = 0.0
    masking.at_end_of_epoch()
    assert not same(before, masking.masks)


def test_a_layer_that_thaws_moves_again():
    model = mlp(20, 30, 10)
    masking = masked(model)
    model.fc1.requires_grad_(False)
    train(model, masking, 2)
    masking.at_end_of_epoch()
    before = snapshot(masking)
    model.fc1.requires_grad_(True)
    train(model, masking, 2)
    masking.at_end_of_epoch()
    assert not torch.equal(before["fc1.weight"], masking.masks["fc1.weight"])
    masking.check()


def test_a_falling_density_is_that_of_the_layers_that_train():
    model = mlp(20, 30, 10)
    updates = Updates(every=1, last=4, density=CubicDensity(1.0, 0.1, 0, 4))
    masking = masked(model, density=1.0, prune_mode="global_magnitude", growth_mode="random", updates=updates)
    model.fc1.requires_grad_(False)
    train(model, masking, 4)
    assert masking.densities == {"fc1.weight": 1.0, "fc2.weight": 0.1}
    assert masking.baseline_nonzero == 630
    masking.check()


def test_weights_that_keep_their_values_are_frozen_too():
    for held in ("kept", "soft"):
        model = mlp(20, 30, 10)
        masking = masked(model, weights=held, prune_mode="dense_magnitude", growth_mode="dense_magnitude")
        model.fc1.requires_grad_(False)
        before, dense = kept(masking, "fc1.weight"), masking.memory["fc1.weight"]["dense"].clone()
        for _ in range(2):
            train(model, masking, 2)
            masking.at_end_of_epoch()
        assert all(map(torch.equal, before, kept(masking, "fc1.weight")))
        assert torch.equal(dense, masking.memory["fc1.weight"]["dense"])


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_weights_on_sparse_kernels_are_frozen_too():
    model = mlp(20, 30, 10)
    masking = masked(model, weights="sparse", growth_mode="gradient", redistribution_mode="none")
    train(model, masking, 1)
    model.fc1.requires_grad_(False)
    masking.zero_grad()
    before = kept(masking, "fc1.weight")
    for _ in range(2):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    assert all(map(torch.equal, before, kept(masking, "fc1.weight")))
    masking.check()


def test_an_update_without_a_step_moves_all_layers():
    model = mlp(20, 30, 10)
    masking = masked(model)
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert not torch.equal(before["fc1.weight"], masking.masks["fc1.weight"])


def test_layers_whose_loss_does_not_reach_them_are_named_in_a_warning(caplog):
    model = nn.Sequential(mlp(20, 30), nn.Linear(30, 10))
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.2, dense=["last"])
    before = snapshot(masking)
    model.zero_grad()
    model[1](model[0](batch_for(model)).detach()).sum().backward()
    masking.step()
    masking.at_end_of_epoch()
    assert same(before, masking.masks)
    assert "No layer with a mask had a gradient since the last update, so that the masks stay: 0.fc1" in caplog.text


def test_which_layers_had_a_gradient_is_saved_between_two_updates():
    model = TwoHeads()
    masking = masked(model)
    train(model, masking, 1)
    state = masking.state_dict()
    assert [state["layers"][name]["trained"] for name in masking.masks] == [True, True, False]
    masking.at_end_of_epoch()
    assert {layer.trained for layer in masking.layers} == {None}
    masking.load_state_dict(state)
    assert [layer.trained for layer in masking.layers] == [True, True, False]


def test_a_function_that_fails_leaves_frozen_and_other_layers_as_they_were():
    def grow(masking, name, new_mask, total_regrowth, weight):
        raise ZeroDivisionError

    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode=grow)
    model.fc1.requires_grad_(False)
    backward(model)
    masking.step()
    before = snapshot(masking)
    with pytest.raises(ZeroDivisionError):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)
    assert masking.baseline_nonzero == masking.total_nonzero == 180
    masking.grow = GROWTH_FUNCTIONS["random"]
    masking.at_end_of_epoch()
    masking.check()


# Adapters

external = pytest.mark.filterwarnings("ignore")


def with_adapters(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["fc1", "fc2"]))


@external
@by_method
def test_adapters_on_a_masked_model_train_and_its_masks_stay(modes):
    model = mlp(20, 30, 10)
    masking = masked(model, **modes)
    train(model, masking, 2)
    before, weights = snapshot(masking), [layer.weight.clone() for layer in masking.layers]
    adapted = with_adapters(model)
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(adapters) == 4
    masking.optimizer.add_param_group({"params": adapters})
    first = [adapter.clone() for adapter in adapters]
    for _ in range(2):
        train(adapted, masking, 3)
        masking.at_end_of_epoch()
        masking.check()
    assert same(before, masking.masks)
    assert all(map(torch.equal, weights, (layer.weight for layer in masking.layers)))
    assert not any(map(torch.equal, first, adapters))
    merged = adapted.merge_and_unload()
    assert (merged.fc1.weight.count_nonzero() + merged.fc2.weight.count_nonzero()) > 800
    masking.apply_mask()
    assert_masks_hold(masking)
    assert merged.fc1.weight is masking.layers[0].weight


@external
def test_adapters_stay_dense_unless_they_are_named():
    model = with_adapters(mlp(20, 30, 10))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "base" in name)
    masking = masked(model)
    assert len(masking.masks) == 2
    assert not any("lora" in name for name in masking.masks)
    model = with_adapters(mlp(20, 30, 10))
    masking = masked(model, density=0.5, sparse=["*lora_A*"])
    assert len(masking.masks) == 2
    assert all("lora_A" in name for name in masking.masks)
    train(model, masking, 2)
    masking.at_end_of_epoch()
    masking.check()


@external
def test_a_model_of_frozen_weights_and_adapters_has_nothing_to_mask():
    with pytest.raises(ValueError, match=r"steps no weight .* name them in sparse=\['\*lora_A\*'\] to mask them"):
        masked(with_adapters(mlp(20, 30, 10)))
