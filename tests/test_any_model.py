"""Masks hold on weights of any dtype and layout, and on a model that is moved, copied or changed after add_module."""

import copy
import pickle

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import CosineDecay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron", "global_momentum", "random"])
def test_weights_keep_their_dtype(dtype, growth):
    model = mlp(12, 16, 8).to(dtype)
    masking = masked(model, density=0.25, growth_mode=growth)
    train(model, masking)
    masking.at_end_of_epoch()
    train(model, masking)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert masking.total_nonzero == 80
    assert_masks_hold(masking)


@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron", "global_momentum", "random"])
@pytest.mark.parametrize("prune", ["magnitude", "SET", "threshold", "global_magnitude"])
def test_channels_last_changes_no_result(prune, growth):
    def trained(memory_format):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=memory_format)
        masking = masked(model, density=0.3, prune_mode=prune, growth_mode=growth)
        # Gradients may differ in the last bit between the layouts, so the test writes them.
        for step in range(3):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            masking.step()
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        return model, masking

    plain, plain_masking = trained(torch.contiguous_format)
    laid_out, masking = trained(torch.channels_last)
    assert laid_out[2].weight.is_contiguous(memory_format=torch.channels_last)
    for name, mask in masking.masks.items():
        assert torch.equal(mask, plain_masking.masks[name])
    for parameter, other in zip(plain.parameters(), laid_out.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_infinite_and_nan_weights_in_pruned_places_become_zero():
    model = mlp(6, 6)
    masking = masked(model, density=0.5)
    with torch.no_grad():
        model.fc1.weight[~masking.masks["fc1.weight"]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).repeat(6)
    masking.apply_mask()
    assert_masks_hold(masking)


# After add_module


def assert_trains_masked(model, masking):
    for _ in range(2):
        train(model, masking, 2)
        assert_masks_hold(masking)
        masking.at_end_of_epoch()
        masking.check()


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}),
        lambda model: model.requires_grad_(True).train().cpu(),
    ],
)
def test_a_model_that_moved_trains_masked(move):
    model = mlp(20, 30, 10)
    masking = masked(model)
    move(model)
    assert_trains_masked(model, masking)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "with gaps"])
def test_a_weight_of_another_layout_trains_masked(layout):
    model = nn.Conv2d(4, 6, 3)
    masking = masked(model)
    weight = model.weight
    with torch.no_grad():
        if layout == "channels_last":
            model.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            weight.set_(weight.transpose(0, 1).contiguous().transpose(0, 1))
        else:
            weight.set_(torch.cat([weight, weight], dim=3)[..., :3])
    for _ in range(2):
        masking.zero_grad()
        model(torch.randn(2, 4, 5, 5)).square().mean().backward()
        masking.step()
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        masking.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_masks_follow_a_moved_model():
    masking = masked(mlp(20, 30))
    masking.modules[0].cuda()
    masking.apply_mask()
    masking.check()


def test_all_that_belongs_to_a_mask_follows_the_weight_to_its_device():
    masking = masked(mlp(8, 4), density=0.5, pattern="2:4")
    layer = masking.layers[0]
    layer.memory["mine"] = torch.ones(3)
    pattern = layer.pattern
    layer.weight = layer.master = layer.weight.detach().to("meta")  # the one other device that every machine has
    masking.apply_mask()
    assert {part.device.type for part in (layer.mask, layer.ever_active, layer.memory["mine"])} == {"meta"}
    assert layer.mask.shape == (4, 8)
    assert layer.pattern == pattern


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copied_masking_masks_the_copy(copied, pattern):
    model = mlp(20, 32, 12)
    optimizer = sgd(model)
    masking = masked(model, optimizer, density=0.3, pattern=pattern, prune_rate_decay=CosineDecay(0.5, 100))
    train(model, masking, steps=2)
    before = snapshot(masking)
    model, optimizer, other = copied((model, optimizer, masking))
    backward(model)
    optimizer.step()
    other.at_end_of_epoch()
    assert (other.steps, masking.steps) == (3, 2)
    assert_masks_hold(other)
    other.check()
    assert same(masking.masks, before)
    for layer, original in zip(other.layers, masking.layers, strict=True):
        assert layer.pattern == original.pattern
        assert layer.pattern.holds(layer.mask)
