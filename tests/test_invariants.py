"""What always holds: counts, zeros, who steps and owns a weight; and that NaN never reaches a selection."""

import copy
import pickle

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, same, snapshot, train
from torch import nn

from sparselearning import CosineDecay, Masking
from sparselearning.invariants import InvariantError, NonFiniteError
from sparselearning.sparse import available


def test_check_passes_through_training():
    masking = masked(mlp(20, 30, 10))
    for _ in range(3):
        train(masking.modules[0], masking, steps=2)
        masking.check()
        masking.at_end_of_epoch()
        masking.check()


def test_check_names_inactive_weights_that_were_written():
    masking = masked(mlp(20, 30))
    with torch.no_grad():
        masking.layers[0].weight.fill_(1)
    with pytest.raises(InvariantError, match=r"fc1\.weight: inactive weights are not zero\. Call apply_mask"):
        masking.check()
    masking.apply_mask()
    masking.check()


def test_check_notices_an_edited_mask():
    masking = masked(mlp(20, 30))
    masking.layers[0].mask.fill_(False)
    masking.apply_mask()
    with pytest.raises(InvariantError, match=r"0 weights are active, 120 should be"):
        masking.check()


def test_check_notices_a_replaced_parameter():
    masking = masked(mlp(20, 30))
    masking.modules[0].fc1.weight = nn.Parameter(torch.ones(30, 20))
    with pytest.raises(InvariantError, match="holds another parameter now"):
        masking.check()


def test_check_notices_another_optimizer():
    masking = masked(mlp(20, 30))
    masking.optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(1))]
    with pytest.raises(InvariantError, match="the optimizer does not step it"):
        masking.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_masks_follow_a_moved_model():
    masking = masked(mlp(20, 30))
    masking.modules[0].cuda()
    masking.apply_mask()
    masking.check()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_a_copied_masking_masks_the_copy(copied):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, CosineDecay(0.5, 100))
    masking.add_module(model, density=0.3)
    train(masking.modules[0], masking, steps=2)
    before = snapshot(masking)
    model, optimizer, other = copied((model, optimizer, masking))
    backward(model)
    optimizer.step()
    other.at_end_of_epoch()
    assert (other.steps, masking.steps) == (3, 2)
    assert_masks_hold(other)
    other.check()
    assert same(masking.masks, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "momentum_buffer"])
@pytest.mark.parametrize("growth", ["momentum", "random"])
def test_an_update_with_a_number_that_is_none_is_refused(bad, where, growth):
    masking = masked(mlp(20, 30, 10), growth_mode=growth)
    train(masking.modules[0], masking, steps=1)
    layer = masking.layers[1]
    place = layer.weight if where == "weight" else masking.optimizer.state[layer.weight][where]
    with torch.no_grad():
        place[layer.mask.nonzero()[0].unbind()] = bad
    masks = snapshot(masking)
    with pytest.raises(NonFiniteError, match=rf"{where} of fc2\.weight\. The masks stay"):
        masking.at_end_of_epoch()
    assert same(masks, masking.masks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("modes", [dict(growth_mode="gradient"), dict(prune_mode="magnitude_gradient")])
def test_an_update_that_reads_a_gradient_that_is_none_is_refused(bad, modes):
    masking = masked(mlp(20, 30, 10), **modes)
    train(masking.modules[0], masking, steps=1)
    masking.layers[1].weight.grad[0, 0] = bad
    masks = snapshot(masking)
    with pytest.raises(NonFiniteError, match=r"gradient of fc2\.weight\. The masks stay"):
        masking.at_end_of_epoch()
    assert same(masks, masking.masks)
    masking.layers[1].weight.grad[0, 0] = 0.0
    masking.at_end_of_epoch()
    assert not same(masks, masking.masks)


def test_an_update_that_reads_no_gradient_asks_for_none():
    masking = masked(mlp(20, 30, 10))  # as after a step that GradScaler skipped
    train(masking.modules[0], masking, steps=1)
    masking.layers[1].weight.grad.fill_(float("inf"))
    masking.at_end_of_epoch()
    masking.check()


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_a_momentum_on_sparse_kernels_is_looked_at():
    masking = masked(mlp(20, 30, 10), sparse_backend="cpu")
    train(masking.modules[0], masking, steps=1)
    masking.optimizer.state[masking.modules[0].fc2.value]["momentum_buffer"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"momentum_buffer of fc2\.weight\. The masks stay"):
        masking.at_end_of_epoch()


def test_large_finite_weights_are_no_infinite_ones():
    masking = masked(mlp(20, 30), growth_mode="random", redistribution_mode="none")
    with torch.no_grad():
        masking.layers[0].weight.fill_(3e38)
    masking.apply_mask()
    masking.at_end_of_epoch()


# A model that is moved, copied or changed after add_module


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


def test_an_update_notices_parameters_that_a_conversion_replaced():
    model = mlp(20, 30)
    masking = masked(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(InvariantError, match=r"fc1\.weight: the module holds another parameter now"):
        masking.at_end_of_epoch()


def test_an_update_notices_another_optimizer():
    model = mlp(20, 30)
    masking = masked(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(InvariantError, match=r"are active in fc1\.weight\. Another optimizer"):
        masking.at_end_of_epoch()


def test_check_notices_a_mask_on_another_device():
    model = mlp(20, 30)
    masking = masked(model)
    masking.layers[0].mask = masking.layers[0].mask.to("meta")
    with pytest.raises(InvariantError, match=r"the weight is on cpu, its mask on meta\. Call apply_mask\(\)"):
        masking.check()
