"""Several optimizers of one network: one Masking, one budget, exact counts."""

import copy

import pytest
import torch
from helpers import assert_masks_hold, backward, mlp, needs_torch, same, train

from sparselearning import Masking, Updates
from sparselearning.schedules import StepDensity

pytestmark = needs_torch(2, 9, "torch.optim.Muon")


def optimizers(model):
    """Return Muon for the first two matrices, and AdamW for all else."""
    matrices = [model.fc1.weight, model.fc2.weight]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def masked(model, density=0.2, **modes):
    both = optimizers(model)
    masking = Masking(both, None, **({"redistribution_mode": "magnitude", "prune_rate": 0.5} | modes))
    masking.add_module(model, density)
    return both, masking


@pytest.mark.parametrize("growth", ["momentum", "gradient", "random"])
def test_weights_move_between_the_layers_of_two_optimizers(growth):
    model = mlp(20, 30, 20, 10)
    (muon, adamw), masking = masked(model, growth_mode=growth)
    first = dict(masking.name2nonzeros)
    for _ in range(3):
        for _ in range(2):
            backward(model)
            muon.step()
            adamw.step()
        masking.at_end_of_epoch()
        assert masking.total_nonzero == round(0.2 * 1400)
        assert_masks_hold(masking)
        masking.check()
    assert masking.steps == 6
    assert masking.name2nonzeros != first


def test_masks_hold_between_the_steps_of_two_optimizers():
    model = mlp(20, 30, 20, 10)
    both, masking = masked(model)
    for optimizer in (*both, *reversed(both)):
        backward(model)
        optimizer.step()
        assert_masks_hold(masking)
    assert masking.steps == 2


def test_masking_steps_all_and_moves_masks_once_for_all():
    model = mlp(20, 30, 20, 10)
    _, masking = masked(model, updates=Updates(every=2, density=StepDensity(0.2, 0.1, 2)))
    counts = []
    for _ in range(3):
        masking.zero_grad()
        train(model, masking, 1)
        counts.append(masking.total_nonzero)
    assert counts == [280, 140, 140]


def test_a_copy_of_both_goes_on_alike():
    model = mlp(20, 30, 20, 10)
    _, masking = masked(model)
    train(model, masking, 1)
    other, again = copy.deepcopy((model, masking))
    for network, one in ((model, masking), (other, again)):
        torch.manual_seed(1)
        train(network, one)
        one.at_end_of_epoch()
    assert same(masking.masks, again.masks)
    assert masking.steps == again.steps == 4


def test_momenta_of_different_kinds_are_not_compared():
    model = mlp(20, 30, 20, 10)
    with pytest.raises(ValueError, match="momenta of AdamW and Muon have different units"):
        masked(model, redistribution_mode="momentum")
    with pytest.raises(ValueError, match="growth_mode='global_momentum' compares"):
        masked(model, growth_mode="global_momentum")
    _, masking = masked(model, {"fc[12]": 0.2, "fc3": 0.5}, redistribution_mode="momentum")
    train(model, masking)
    masking.at_end_of_epoch()
    assert [budget.nonzeros for budget in masking.budgets] == [240, 100]
    assert masking.total_nonzero == 340


def test_what_several_optimizers_cannot_do_is_refused():
    model = mlp(20, 30, 20, 10)
    both = optimizers(model)
    for weights in ("kept", "soft", "sparse"):
        with pytest.raises(ValueError, match=f"weights='{weights}' needs one optimizer, got several"):
            Masking(both, None, weights=weights)
    with pytest.raises(ValueError, match="two that step the same one"):
        Masking([both[0], both[0]], None)
    with pytest.raises(ValueError, match="got none"):
        Masking([], None)
    with pytest.raises(RuntimeError, match="Adagrad holds no momentum"):
        Masking([both[0], torch.optim.Adagrad(model.fc3.parameters())], None)
    _, masking = masked(model)
    with pytest.raises(ValueError, match="take no closure"):
        masking.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match="state_dict of each"):
        masking.optimizer.state_dict()


def test_a_gradient_scaler_steps_both():
    model = mlp(20, 30, 20, 10)
    _, masking = masked(model)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        masking.zero_grad()
        scaler.scale(model(torch.randn(4, 20)).square().mean()).backward()
        scaler.step(masking)
        scaler.update()
    assert masking.steps == 2
    assert_masks_hold(masking)
