"""Copies of a network are masked as the network is: averages, teachers, saved weights."""

import copy

import pytest
import torch
from helpers import batch_for, masked, mlp, sgd, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparselearning import Masking


def assert_masked(masking, module):
    weights = dict(module.named_parameters())
    for name, mask in masking.masks.items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].any()


def averaged(model, masking, average, update):
    """Train for some updates of the masks, averaging after every step."""
    for _ in range(3):
        for _ in range(2):
            train(model, masking, 1)
            update(model)
        masking.at_end_of_epoch()
    return average


AVERAGES = {"mean": None, "moving": get_ema_multi_avg_fn(0.9)}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_of_moving_masks_is_masked(kind):
    model = mlp(20, 30, 10)
    masking = masked(model)
    average = AveragedModel(model, multi_avg_fn=AVERAGES[kind])
    averaged(model, masking, average, average.update_parameters)
    with pytest.raises(AssertionError):
        assert_masked(masking, average.module)
    masking.apply_to(average)
    assert_masked(masking, average.module)
    assert average(batch_for(model)).isfinite().all()
    masking.check()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_an_average_of_timm_is_masked(kind):
    utils = pytest.importorskip("timm.utils")
    model = mlp(20, 30, 10)
    masking = masked(model)
    average = getattr(utils, kind)(model, decay=0.9)
    averaged(model, masking, average, average.update)
    module = average.ema if kind == "ModelEma" else average.module
    masking.apply_to(module)
    assert_masked(masking, module)


def test_a_teacher_in_another_precision_and_a_saved_model_are_masked():
    model = mlp(20, 30, 10)
    teacher = copy.deepcopy(model).double()
    saved = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    masking = masked(model)
    masking.apply_to(teacher)
    masking.apply_to(saved)
    assert_masked(masking, teacher)
    for name, mask in masking.masks.items():
        assert not saved[f"module.{name}"][~mask].any()


def test_a_compiled_copy_is_masked():
    model = mlp(20, 30, 10)
    masking = masked(torch.compile(model, backend="eager"))
    twin = mlp(20, 30, 10)
    masking.apply_to(torch.compile(twin, backend="eager"))
    assert_masked(masking, twin)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (mlp(20, 30), r"fc2\.weight is absent, here \(10, 30\)"),
        (mlp(20, 30, 9), r"fc2\.weight is \(9, 30\), here \(10, 30\)"),
        ({}, r"a dict in which fc1\.weight is absent"),
        (nn.Sequential(mlp(20, 30, 10), nn.ReLU()), r"fc1\.weight is absent"),
    ],
)
def test_what_is_no_copy_is_refused_with_the_differences_and_stays(other, difference):
    masking = masked(mlp(20, 30, 10))
    weights = [*other.values()] if isinstance(other, dict) else [*other.parameters()]
    before = [weight.clone() for weight in weights]
    with pytest.raises(ValueError, match=difference):
        masking.apply_to(other)
    assert all(map(torch.equal, before, weights))


def test_of_several_modules_the_one_that_was_copied_is_named():
    first, second = mlp(20, 30, 10), mlp(20, 30, 10)
    masking = Masking(sgd(first, second), None)
    masking.add_module(first, 0.2)
    masking.add_module(second, 0.2)
    twin = copy.deepcopy(second)
    with torch.no_grad():
        twin.fc1.weight.fill_(1)
    with pytest.raises(ValueError, match=r"masks 2 modules\. Say which"):
        masking.apply_to(twin)
    masking.apply_to(twin, second)
    assert torch.equal(twin.fc1.weight != 0, masking.masks["1.fc1.weight"])
    with pytest.raises(ValueError, match="masks no weight of Linear"):
        masking.apply_to(twin, nn.Linear(3, 3))


@pytest.mark.parametrize("weights", ["kept", "soft"])
def test_a_copy_of_weights_that_keep_their_values_is_masked(weights):
    model = mlp(20, 30, 10)
    masking = masked(model, weights=weights)
    average = AveragedModel(model)
    averaged(model, masking, average, average.update_parameters)
    masking.apply_to(average)
    assert_masked(masking, average.module)
