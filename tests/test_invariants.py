"""What always holds of counts, zeros and owners of weights; NaN never reaches a selection."""

import gc

import pytest
import torch
from helpers import masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking, network_wide
from sparselearning.invariants import InvariantError, NonFiniteError
from sparselearning.sparse import available

needs_kernels = pytest.mark.skipif(not available(), reason="built without sparse kernels")


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


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        (None, lambda masking: masking.masks["fc1.weight"].fill_(False), "0 weights are active, 120 should be"),
        (None, lambda masking: setattr(masking, "baseline_nonzero", 121), "120 weights are active, 121 should be"),
        ("fan-in:0.3", lambda masking: setattr(masking, "baseline_nonzero", 121), "120 weights are active, 121 should"),
    ],
)
def test_check_notices_a_count_that_is_off(pattern, change, message):
    masking = masked(mlp(20, 30), pattern=pattern, redistribution_mode="none")
    change(masking)
    masking.apply_mask()
    with pytest.raises(InvariantError, match=message):
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "momentum_buffer"])
@pytest.mark.parametrize("growth", ["momentum", "random"])
def test_an_update_with_nan_or_infinity_is_refused(bad, where, growth):
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
def test_an_update_that_reads_a_nan_or_infinite_gradient_is_refused(bad, modes):
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
def test_the_momentum_on_sparse_kernels_is_checked():
    masking = masked(mlp(20, 30, 10), weights="sparse")
    train(masking.modules[0], masking, steps=1)
    masking.optimizer.state[masking.modules[0].fc2.value]["momentum_buffer"][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"momentum_buffer of fc2\.weight\. The masks stay"):
        masking.at_end_of_epoch()


def test_large_finite_weights_do_not_count_as_infinite():
    masking = masked(mlp(20, 30), growth_mode="random", redistribution_mode="none")
    with torch.no_grad():
        masking.layers[0].weight.fill_(3e38)
    masking.apply_mask()
    masking.at_end_of_epoch()


# Other parameters and optimizers than there were


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


def test_every_gradient_that_a_function_reads_is_checked():
    @network_wide
    def grow(masking, total):
        for layer in masking.layers:
            masking.get_gradient_for_weight(layer.weight)
        return masking.masks

    model = mlp(10, 20, 10)
    masking = masked(model, growth_mode=grow)
    train(model, masking, 1)
    masking.layers[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as refused:
        masking.at_end_of_epoch()
    assert "gradient of fc1.weight" in str(refused.value)
    assert "fc2" not in str(refused.value)


# Two Maskings


@pytest.mark.parametrize("weights", ["zero", "kept", pytest.param("sparse", marks=needs_kernels)])
@pytest.mark.parametrize("optimizers", ["one", "two"])
def test_a_second_masking_takes_the_weights_of_the_first(optimizers, weights, caplog):
    model = mlp(6, 5, 4)
    first = masked(model, weights=weights)
    train(model, first, 2)
    second = masked(model, first.optimizer if optimizers == "one" else sgd(model), 0.5, weights=weights)
    warned = "Another Masking lets go of fc1.weight, fc2.weight. It was made with another optimizer" in caplog.text
    assert warned == (optimizers == "two")
    assert first.layers == []
    for _ in range(2):
        train(model, second, 2)
        second.at_end_of_epoch()
        second.check()
    assert second.steps == 4
    assert first.steps == 2
    assert second.total_nonzero == 25
    with pytest.raises(RuntimeError, match="This Masking has been released, or another took its weights"):
        first.at_end_of_epoch()
    with pytest.raises(RuntimeError, match="This Masking has been released, or another took its weights"):
        first.add_module(model, 0.5)


def test_a_second_masking_takes_single_layers_of_the_first():
    model = mlp(6, 5, 4)
    first = masked(model)
    second = Masking(first.optimizer, None)
    second.add_module(model.fc2, 0.5)
    assert list(first.masks) == ["fc1.weight"]
    for _ in range(2):
        train(model, first, 2)
        for masking in (first, second):
            masking.at_end_of_epoch()
            masking.check()


def test_a_second_masking_that_cannot_be_made_leaves_the_first_as_it_was():
    model = mlp(6, 5, 4)
    first = masked(model)
    with pytest.raises(ValueError, match="density"):
        masked(model, first.optimizer, density=2.0)
    train(model, first, 2)
    first.at_end_of_epoch()
    first.check()


@pytest.mark.parametrize("weights", ["zero", "kept", "soft", pytest.param("sparse", marks=needs_kernels)])
def test_a_model_trains_densely_after_its_masking_is_released(weights):
    model = mlp(6, 5, 4)
    masking = masked(model, weights=weights)
    train(model, masking, 1)
    inactive = ~masking.masks["fc1.weight"]
    masking.release()
    train(model, masking.optimizer, 2)
    assert model.fc1.weight[inactive].any()
    assert type(model.fc1) is nn.Linear
    assert not masking.optimizer._optimizer_step_pre_hooks
    assert not masking.optimizer._optimizer_step_post_hooks
    masking.release()  # a second time changes nothing
    masked(model, masking.optimizer).check()


def test_a_second_masking_takes_what_the_first_left_dense():
    model = mlp(6, 5, 4)
    first = Masking(sgd(model), None)
    first.add_module(model, 0.5, remove_param_names="fc2")
    second = Masking(first.optimizer, None)
    second.add_module(model.fc2, 0.5)
    train(model, first, 2)
    first.check()
    second.check()


def test_a_masking_that_nobody_holds_does_not_count_as_a_second_one():
    model = mlp(6, 5, 4)
    gc.disable()
    try:
        masked(model)
        masked(model, sgd(model)).check()
    finally:
        gc.enable()
