"""The values that weights start from, at the beginning and when they become active; and the pull to zero."""

import copy
import math

import pytest
import torch
from by_method import batch, begin
from helpers import assert_masks_hold, batch_for, masked, mlp, sgd, snapshot, train
from torch import nn

from sparselearning.sparse import available
from sparselearning.weights.zeros import Zeros

# When they become active


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("reset", [True, False])
def test_the_state_of_regrown_weights_is_reset(optimizer, reset):
    model, optimizer, masking = begin("rigl", optimizer, prune_every_k_steps=3, reset_state=reset)
    train(model, optimizer, 2)
    before = snapshot(masking)
    train(model, optimizer, 1)
    for layer in masking.layers:
        regrown = layer.mask & ~before[layer.name]
        assert regrown.any()
        for key, value in optimizer.state[layer.weight].items():
            if key != "step":
                assert bool(value[regrown].any()) is not reset
                assert value[layer.mask & ~regrown].any()


def test_regrown_weights_are_drawn_as_torch_does():
    model = mlp(300, 200, 10)
    masking = masked(model, density=0.3, prune_rate=0.3, growth_mode="random", weights=Zeros(regrown="random"))
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert_masks_hold(masking)
    layer = masking.layers[0]
    regrown = layer.weight[layer.mask & ~before[layer.name]]
    assert regrown.abs().max().item() == pytest.approx(1 / math.sqrt(300), rel=0.01)
    assert regrown.abs().mean().item() == pytest.approx(0.5 / math.sqrt(300), rel=0.05)
    assert abs(regrown.mean().item()) < 0.05 / math.sqrt(300)


def test_an_unknown_start_value_is_refused():
    with pytest.raises(ValueError, match=r"Unknown regrown 'one'. Choose one of 'zero', 'random'."):
        Zeros(regrown="one")


# At the start


def norms(masking):
    return [layer.weight.norm().item() for layer in masking.layers]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("mest", "block:2x2"), ("rigl", "2:5"), ("snip", None), ("granet", None)],
)
def test_rescaled_layers_have_the_norm_they_had_without_masks(method, pattern):
    torch.manual_seed(5)
    whole = mlp(20, 30, 10)
    torch.manual_seed(5)
    _, _, masking = begin(method, rescale=True, pattern=pattern)
    assert norms(masking) == pytest.approx([whole.fc1.weight.norm().item(), whole.fc2.weight.norm().item()])
    assert_masks_hold(masking)


def test_a_rescaled_network_of_one_percent_passes_its_signal_on():
    torch.manual_seed(0)
    model = mlp(500, 500, 500, 500)
    images = batch_for(model, 64)
    whole = model(images).std(0).mean().item()
    for rescale, expected in ((False, 0.0), (True, 1.0)):
        sparse = copy.deepcopy(model)
        masked(sparse, density=0.01, rescale=rescale)
        assert sparse(images).std(0).mean().item() / whole == pytest.approx(expected, abs=0.2)


def test_rescaling_leaves_weights_alone_that_have_their_norm_or_none():
    model = mlp(20, 30, 10)
    nn.init.zeros_(model.fc2.weight)
    before = model.fc1.weight.clone()
    masking = masked(model, density={"fc1": 1.0, "*": 0.5}, rescale=True)
    assert torch.equal(model.fc1.weight, before)
    assert not model.fc2.weight.any()
    masking = masked(mlp(20, 30, 10), density=0.2)
    module = masking.modules[0]
    values = norms(masking)
    masking.remove_weight_partial_name("")
    assert norms(masked(module, sparse_init="resume", rescale=True)) == values


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_sparse_kernels_begin_with_rescaled_weights():
    outputs = []
    for weights in ("zero", "sparse"):
        torch.manual_seed(5)
        model, _, masking = begin("set", rescale=True, weights=weights)
        outputs.append(model(batch()[0]))
        assert_masks_hold(masking)
    torch.testing.assert_close(*outputs)


def test_weights_that_are_active_for_their_magnitude_are_not_rescaled():
    with pytest.raises(ValueError, match="With weights='kept' magnitudes decide what is active; leave out rescale"):
        begin("top_kast", rescale=True)


# The pull


def test_a_pull_is_an_l1_term():
    model, twin = mlp(20, 30, 10), mlp(20, 30, 10)
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(8, 20)
    plain, pulled = (masked(net, density=1.0, weights=Zeros(pull=pull)) for net, pull in [(model, 0.0), (twin, 0.01)])
    for net, masking, l1 in [(model, plain, 0.01), (twin, pulled, 0)]:
        net.zero_grad()
        weights = [layer.weight for layer in masking.layers]
        ((net(inputs) - 1).square().mean() + l1 * sum(weight.abs().sum() for weight in weights)).backward()
        masking.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_pull_is_to_zero_where_an_optimizer_maximises():
    """Groups say so each for itself; the objective is constant, so that nothing but the pull moves the weights."""
    model = mlp(5, 4, 3)
    first = dict(params=list(model.fc1.parameters()), maximize=True)
    optimizer = torch.optim.SGD([first, dict(params=list(model.fc2.parameters()))], lr=0.1)
    masked(model, optimizer, density=1.0, growth_mode="random", redistribution_mode="none", weights=Zeros(pull=0.1))
    before = [layer.weight.detach().clone() for layer in (model.fc1, model.fc2)]
    (0 * model(batch_for(model))).sum().backward()
    optimizer.step()
    for layer, old in zip((model.fc1, model.fc2), before, strict=True):
        torch.testing.assert_close(layer.weight, old - 0.01 * old.sign())


def test_the_pull_is_as_strong_under_a_gradient_scaler():
    weights = []
    for scale in (1.0, 8.0):
        torch.manual_seed(4)
        model = mlp(6, 5)
        optimizer = sgd(model, fused=True)
        masked(model, optimizer, density=0.5, weights=Zeros(pull=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
        scaler.step(optimizer)
        weights.append(model.fc1.weight.detach())
    assert torch.equal(*weights)


def test_an_infinite_pull_is_refused():
    with pytest.raises(ValueError, match="Expected a pull of at least 0, got inf"):
        Zeros(pull=math.inf)
