"""Many layers, tiny layers, hardly any weights, parameters of odd kinds, and masks that move at every step."""

import gc

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, train
from torch import nn

from sparselearning import Masking
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.start.distributions import divide


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def test_a_thousand_layers():
    model = nn.ModuleList(nn.Linear(4, 5, bias=False) for _ in range(1000))
    masking = masked(model, density=0.1)
    assert masking.total_nonzero == 2000
    for _ in range(3):
        for layer in masking.layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        masking.step()
        masking.at_end_of_epoch()
        masking.check()
    assert all(layer.nonzeros for layer in masking.layers)
    assert masking.total_nonzero == 2000


@pytest.mark.parametrize("growth", [name for name in GROWTH_FUNCTIONS if "dense" not in name])  # of inactive="kept"
def test_layers_of_one_weight(growth):
    model = mlp(1, 1, 1)
    masking = masked(model, density=1.0, growth_mode=growth)
    for _ in range(3):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        masking.check()
    assert masking.total_nonzero == 2


def test_one_weight_stays_in_every_layer_where_the_density_leaves_less():
    model = mlp(10, 10, 10, 10, 10)
    with pytest.warns(UserWarning, match=r"A density of 2 of 400 weights leaves less than one in each of 4 layers"):
        masking = masked(model, density=0.005)
    assert [layer.nonzeros for layer in masking.layers] == [1, 1, 1, 1]
    masking.check()


def test_the_total_is_exact_where_the_density_leaves_one_weight_per_layer():
    assert divide(3, shares=[10**6, 4, 4], capacities=[10**6, 4, 4], steps=[1, 1, 1]) == [1, 1, 1]
    assert divide(5, shares=[100, 1], capacities=[100, 1], steps=[1, 1]) == [4, 1]


@pytest.mark.parametrize("redistribution", ["momentum", "magnitude", "nonzeros", "none"])
def test_no_layer_loses_its_last_weight(redistribution):
    model = mlp(10, 10, 10, 10)
    masking = masked(model, density=0.04, prune_rate=0.9, redistribution_mode=redistribution)
    for _ in range(10):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        assert masking.total_nonzero == 12
        assert all(layer.nonzeros for layer in masking.layers)


def test_all_weights_active_is_dense_training():
    dense, model = mlp(6, 5, 4), mlp(6, 5, 4)
    model.load_state_dict(dense.state_dict())
    masking = masked(model, density=1.0)
    optimizer = sgd(dense)
    for _ in range(4):
        inputs = torch.randn(8, 6)
        train(dense, optimizer, 1, inputs)
        train(model, masking, 1, inputs)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), model.parameters(), strict=True))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)

    def forward(self, x):
        return self.scale * x @ self.weight @ self.frozen


def test_odd_parameters_stay_dense():
    model = Odd()
    frozen = model.frozen.clone()
    masking = masked(model, sgd(model), density=0.5)
    assert list(masking.masks) == ["weight"]
    for _ in range(3):
        masking.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        masking.step()
        masking.at_end_of_epoch()
    masking.check()
    assert torch.equal(model.frozen, frozen)


def test_parameters_added_later_join():
    model = mlp(6, 5)
    masking = masked(model, density=0.5)
    train(model, masking, 2)
    model.add_module("more", nn.Linear(5, 4))
    masking.optimizer.add_param_group({"params": list(model.more.parameters())})
    masking.add_module(model, density=0.5)
    assert list(masking.masks) == ["fc1.weight", "more.weight"]
    train(model, masking, 1)
    masking.at_end_of_epoch()
    masking.check()
    assert masking.total_nonzero == masking.baseline_nonzero == 25


def test_the_masks_may_move_at_every_step():
    model = mlp(12, 10, 8)
    masking = masked(model, density=0.2, prune_every_k_steps=1)
    for _ in range(30):
        train(model, masking, 1)
        assert masking.total_nonzero == 40
        assert_masks_hold(masking)


# Two Maskings


def test_a_second_masking_on_a_weight_is_refused():
    model = mlp(6, 5, 4)
    first = masked(model)
    with pytest.raises(RuntimeError, match=r"Another Masking masks fc1\.weight, fc2\.weight"):
        masked(model, sgd(model))
    first.remove_weight_partial_name("")
    masked(model, sgd(model)).check()


def test_a_second_masking_takes_what_the_first_left_dense():
    model = mlp(6, 5, 4)
    first = Masking(sgd(model), None)
    first.add_module(model, 0.5, remove_param_names="fc2")
    second = Masking(first.optimizer, None)
    second.add_module(model.fc2, 0.5)
    train(model, first, 2)
    first.check()
    second.check()


def test_a_masking_that_nobody_holds_is_no_second_one():
    model = mlp(6, 5, 4)
    gc.disable()
    try:
        masked(model)
        masked(model, sgd(model)).check()
    finally:
        gc.enable()
