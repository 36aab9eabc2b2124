"""Steps with a closure: an optimizer that computes the loss itself sees the masked network, every time."""

import copy

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking
from sparselearning.sparse import available
from sparselearning.weights.zeros import Zeros

STATIC = dict(growth_mode="random", redistribution_mode="none")


def closure_for(model, masking=None, seen=None, seed=0):
    """Return a closure of a regression, which notes whether the masks held in its forward pass."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(32, 20, generator=generator), torch.randn(32, 10, generator=generator)

    def closure():
        if masking is not None:
            seen.append(all(not layer.weight[~layer.mask].any() for layer in masking.layers))
        model.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    return closure


class Twice(torch.optim.SGD):
    """Evaluates its closure once before and once after half a step, as extragradient methods do."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def steps_of(masking, how):
    return {
        "masking": masking.step,
        "optimizer": masking.optimizer.step,
        "by name": lambda closure: masking.optimizer.step(closure=closure),
    }[how]


LBFGS = [{}, {"line_search_fn": "strong_wolfe"}]


@pytest.mark.parametrize("how", ["masking", "optimizer", "by name"])
@pytest.mark.parametrize("settings", LBFGS, ids=["plain", "line search"])
def test_lbfgs_sees_the_masked_network_in_every_evaluation(settings, how):
    model = mlp(20, 30, 10)
    masking = masked(model, torch.optim.LBFGS(model.parameters(), **settings), **STATIC)
    seen = []
    for _ in range(2):
        loss = steps_of(masking, how)(closure_for(model, masking, seen))
    assert loss > 0
    assert len(seen) > 4
    assert all(seen)
    assert masking.steps == 2
    assert_masks_hold(masking)


def with_gradients_masked_by_hand(model, masks, steps, settings):
    """Return the losses of LBFGS that is given masked gradients, as the reference."""
    optimizer = torch.optim.LBFGS(model.parameters(), **settings)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    evaluate = closure_for(model)

    def closure():
        loss = evaluate()
        for name, mask in masks.items():
            weights[name].grad.mul_(mask)
        return loss

    return [optimizer.step(closure).item() for _ in range(steps)]


@pytest.mark.parametrize("settings", LBFGS, ids=["plain", "line search"])
def test_lbfgs_reaches_what_masking_gradients_by_hand_reaches(settings):
    model = mlp(20, 30, 10)
    twin = copy.deepcopy(model)
    masking = masked(model, torch.optim.LBFGS(model.parameters(), **settings), 0.5, **STATIC)
    losses = [masking.step(closure_for(model)).item() for _ in range(8)]
    expected = with_gradients_masked_by_hand(twin, masking.masks, 8, settings)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]


def test_lbfgs_starts_anew_where_masks_have_moved():
    model = mlp(20, 30, 10)
    masking = masked(model, torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"), 0.5, **STATIC)
    seen, losses = [], []
    for _ in range(4):
        losses += [masking.step(closure_for(model, masking, seen)).item() for _ in range(2)]
        masking.at_end_of_epoch()
    assert all(seen)
    assert losses[-1] < losses[0]
    masking.check()


def test_growth_by_the_gradient_reads_that_of_all_weights_from_lbfgs():
    model = mlp(20, 30, 10)
    masking = masked(
        model, torch.optim.LBFGS(model.parameters(), max_iter=1), growth_mode="gradient", redistribution_mode="none"
    )
    masking.step(closure_for(model))
    for layer in masking.layers:
        assert not layer.weight.grad[~layer.mask].any()
        assert masking.get_gradient_for_weight(layer.weight)[~layer.mask].any()
    masking.at_end_of_epoch()
    masking.check()


@pytest.mark.parametrize("how", ["masking", "optimizer", "by name"])
@pytest.mark.parametrize("weights", ["zero", "kept", "soft", "sparse"])
def test_every_evaluation_sees_the_masked_network(weights, how):
    if weights == "sparse" and not available():
        pytest.skip("built without sparse kernels")
    model = mlp(20, 30, 10)
    masking = masked(model, Twice(model.parameters(), lr=0.1), weights=weights, **STATIC)
    seen = []
    for _ in range(3):
        steps_of(masking, how)(closure_for(model, masking, seen))
    assert seen == [True] * 6
    masking.at_end_of_epoch()
    masking.check()


@pytest.mark.parametrize("held", ["zero", "kept", "soft", "sparse", "pull"])
def test_a_closure_of_one_evaluation_trains_as_a_loop_does(held):
    if held == "sparse" and not available():
        pytest.skip("built without sparse kernels")

    def trained(with_closure):
        torch.manual_seed(0)
        model = mlp(20, 30, 10)
        weights = Zeros(pull=0.01) if held == "pull" else held
        masking = masked(model, sgd(model, weight_decay=0.01), weights=weights, prune_every_k_steps=2)
        for seed in range(5):
            closure = closure_for(model, seed=seed)
            if with_closure:
                masking.step(closure)
            else:
                closure()
                masking.step()
        return model, masking

    (model, masking), (twin, expected) = trained(True), trained(False)
    assert same(model.state_dict(), twin.state_dict())
    assert same(masking.masks, expected.masks)


def test_two_maskings_on_one_optimizer_both_mask_a_closure():
    first, second = mlp(20, 30, 10), mlp(10, 20, 10)
    model = nn.Sequential(first, second)
    optimizer = Twice(model.parameters(), lr=0.1)
    maskings = [masked(part, optimizer, **STATIC) for part in (first, second)]
    seen = [[], []]
    closure = closure_for(model, maskings[0], seen[0])

    def both():
        seen[1].append(all(not layer.weight[~layer.mask].any() for layer in maskings[1].layers))
        return closure()

    optimizer.step(both)
    maskings[0].step(both)
    assert seen == [[True] * 4] * 2


def test_a_copy_masks_its_own_closures():
    model = mlp(20, 30, 10)
    masking = masked(model, Twice(model.parameters(), lr=0.1), **STATIC)
    masking.step(closure_for(model))
    before = snapshot(masking)
    model, masking = copy.deepcopy((model, masking))
    seen = []
    masking.step(closure_for(model, masking, seen))
    assert all(seen)
    assert same(before, masking.masks)


def test_steps_without_a_closure_stay_as_they_are():
    model = mlp(20, 30, 10)
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.2)
    train(model, masking.optimizer)
    assert_masks_hold(masking)


def test_an_optimizer_that_fails_after_an_evaluation_pulls_as_before_afterwards():
    def trained(failing):
        torch.manual_seed(0)
        model = mlp(20, 30, 10)
        masking = masked(model, Failing(model.parameters(), lr=0.1), weights=Zeros(pull=0.1), **STATIC)
        if failing:
            with pytest.raises(ZeroDivisionError):
                masking.step(closure_for(model))
        masking.optimizer.fails = False
        closure_for(model)()
        masking.step()
        return model

    assert same(trained(False).state_dict(), trained(True).state_dict())


class Failing(torch.optim.SGD):
    """Fails right after it has evaluated its closure."""

    fails = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fails:
            with torch.enable_grad():
                closure()
            raise ZeroDivisionError
        super().step()
