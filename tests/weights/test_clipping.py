"""The norm of gradients counts those of weights that train."""

import math

import pytest
import torch
from helpers import backward, masked, mlp, train

from sparselearning.sparse import available


def gradients_that_train(model, masking):
    """Return copies of the gradients, zero where weights are inactive."""
    masks = {layer.weight: layer.mask for layer in masking.layers}
    return [
        parameter.grad * masks[parameter] if parameter in masks else parameter.grad.clone()
        for parameter in model.parameters()
    ]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_inactive_gradients_do_not_count_and_are_scaled_with_the_others(norm_type):
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.05)
    backward(model)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    counted = gradients_that_train(model, masking)
    expected = torch.cat([gradient.flatten() for gradient in counted]).norm(norm_type)
    norm = masking.clip_grad_norm_(expected.item() / 2, norm_type)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 2)


def test_a_dense_network_is_clipped_as_torch_clips():
    model, twin = mlp(20, 30, 10), mlp(20, 30, 10)
    twin.load_state_dict(model.state_dict())
    masking = masked(model, density=1.0)
    inputs = torch.randn(8, 20)
    backward(model, inputs)
    backward(twin, inputs)
    assert masking.clip_grad_norm_(0.1) == torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    assert all(
        torch.equal(one.grad, other.grad) for one, other in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_small_gradients_stay():
    model = mlp(20, 30, 10)
    masking = masked(model)
    backward(model)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    masking.clip_grad_norm_(1e6)
    assert all(map(torch.equal, before, (parameter.grad for parameter in model.parameters())))


@pytest.mark.parametrize("held", ["kept", "soft", "sparse"])
def test_gradients_of_all_weights_that_train_count(held):
    if held == "sparse" and not available():
        pytest.skip("built without sparse kernels")
    model = mlp(20, 30, 10)
    masking = masked(model, weights=held)
    backward(model)
    if held == "sparse":
        counted = [masking.held.trained[layer.name].value.grad for layer in masking.layers]
    else:
        counted = [layer.weight.grad * layer.memory.get("trained", True) for layer in masking.layers]
    counted += [model.fc1.bias.grad, model.fc2.bias.grad]
    expected = torch.cat([gradient.flatten() for gradient in counted]).norm()
    torch.testing.assert_close(masking.clip_grad_norm_(1.0), expected)


def test_parameters_without_gradient_and_frozen_ones_are_left_out():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 1)
    model.fc1.requires_grad_(False)
    backward(model)
    assert masking.clip_grad_norm_(1.0) > 0


def test_a_norm_that_is_not_finite_is_an_error_where_it_is_asked_for():
    model = mlp(20, 30, 10)
    masking = masked(model)
    backward(model)
    layer = masking.layers[0]
    layer.weight.grad[~layer.mask] = math.nan
    assert masking.clip_grad_norm_(1.0, error_if_nonfinite=True).isfinite()
    layer.weight.grad[layer.mask] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        masking.clip_grad_norm_(1.0, error_if_nonfinite=True)
