"""Which weights of a module become sparse layers, and what they are called."""

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, sgd, train
from torch import nn

from sparselearning import Masking
from sparselearning.flops import forward_flops


@pytest.mark.parametrize("names", [["fc2"], ("fc2.weight",), "fc2"])
def test_remove_param_names_keeps_values_of_dense_layers(names):
    model = mlp(20, 30, 10)
    initial = model.fc2.weight.clone()
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.1, remove_param_names=names)
    assert list(masking.masks) == ["fc1.weight"]
    assert torch.equal(model.fc2.weight, initial)


def test_weights_the_optimizer_does_not_step_stay_dense():
    model = mlp(20, 30, 10)
    matrices, others = sgd(model.fc1), torch.optim.Adam(model.fc2.parameters())
    for optimizer, name in ((matrices, "fc1.weight"), (others, "fc2.weight")):
        masking = Masking(optimizer, None)
        masking.add_module(model, 0.1)
        assert list(masking.masks) == [name]


@pytest.mark.parametrize("case", ["another optimizer", "no weights", "added twice"])
def test_a_module_with_nothing_to_mask_is_refused(case):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)) if case == "no weights" else mlp(5, 5)
    masking = Masking(sgd(mlp(5, 5) if case == "another optimizer" else model), None)
    if case == "added twice":
        masking.add_module(model, 0.5)
    with pytest.raises(ValueError, match="SGD steps no weight of Sequential that could be masked and is not yet"):
        masking.add_module(model, 0.5)


def test_two_modules_share_one_budget():
    encoder, head = mlp(20, 30), mlp(30, 10)
    masking = Masking(sgd(encoder, head), None)
    masking.add_module(encoder, 0.1)
    masking.add_module(head, 0.2)
    assert masking.name2nonzeros == {"fc1.weight": 60, "1.fc1.weight": 60}
    assert masking.baseline_nonzero == 120
    train(nn.Sequential(encoder, head), masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 120
    assert_masks_hold(masking)


def test_parameters_added_later_join():
    model = mlp(6, 5, 4)
    masking = Masking(sgd(model.fc1), None)
    masking.add_module(model, 0.5)
    train(model, masking, 2)
    model.add_module("more", nn.Linear(4, 4))
    masking.optimizer.add_param_group({"params": [*model.fc2.parameters(), *model.more.parameters()]})
    masking.add_module(model, 0.25)
    assert masking.name2nonzeros == {"fc1.weight": 15, "fc2.weight": 5, "more.weight": 4}
    train(model, masking, 1)
    masking.at_end_of_epoch()
    masking.check()
    assert masking.total_nonzero == masking.baseline_nonzero == 24


def test_every_weight_has_a_name_of_its_own():
    modules = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), *(nn.Linear(4, 4) for _ in range(3))]
    masking = Masking(sgd(*modules), None)
    for module in modules:
        masking.add_module(module, 0.5)
    assert len(masking.masks) == len(masking.layers) == 6


def test_names_survive_wrappers():
    model = mlp(20, 30, 10)
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    masking = masked(wrapped)
    assert list(masking.masks) == ["fc1.weight", "fc2.weight"]
    masking.remove_weight("module._orig_mod.fc1.weight")
    assert list(masking.masks) == ["fc2.weight"]


class Beside(nn.Module):
    """A part called `module`, as wrappers call what they hold, beside another of the same inside."""

    def __init__(self):
        super().__init__()
        self.module = mlp(20, 30)
        self.fc1 = nn.Linear(30, 10)

    def forward(self, x):
        return self.fc1(self.module(x))


def compiled_beside():
    """The same with a part called as torch.compile calls what it holds."""
    model = nn.Module()
    model._orig_mod, model.fc1 = mlp(20, 30), nn.Linear(30, 10)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile], ids=["", "DP", "compiled"])
def test_two_weights_whose_names_differ_by_a_prefix_are_both_masked(wrap):
    model = wrap(Beside())
    masking = masked(model)
    assert masking.name2nonzeros == {"module.fc1.weight": 120, "fc1.weight": 60}
    assert forward_flops(model, torch.zeros(1, 20)).of_weights == {"module.fc1.weight": 1200, "fc1.weight": 600}
    masking.remove_weight("module.fc1")
    assert list(masking.masks) == ["fc1.weight"]


def test_names_that_differ_by_the_prefix_of_a_compiled_part_are_both_masked():
    assert masked(compiled_beside()).name2nonzeros == {"_orig_mod.fc1.weight": 120, "fc1.weight": 60}
