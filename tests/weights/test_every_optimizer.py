"""Sparse momentum runs with every optimizer that keeps a momentum; for the others the error says what to do."""

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, snapshot, train

MOMENTUM_KEEPERS = {
    "SGD": {"momentum": 0.9},
    "SGD nesterov": {"momentum": 0.9, "nesterov": True},
    "SGD fused": {"momentum": 0.9, "fused": True},
    "SGD foreach": {"momentum": 0.9, "foreach": True},
    "SGD maximize": {"momentum": 0.9, "maximize": True},
    "Adam": {},
    "Adam amsgrad": {"amsgrad": True},
    "Adam fused": {"fused": True},
    "AdamW": {},
    "AdamW foreach": {"foreach": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop": {"momentum": 0.9},
    "RMSprop centered": {"momentum": 0.9, "centered": True},
    "Muon": {},
}


class Lion(torch.optim.Optimizer):
    """A third party's optimizer: the sign of an average, kept as `exp_avg`."""

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    mean = state.setdefault("exp_avg", torch.zeros_like(parameter))
                    parameter.sub_(mean.lerp(parameter.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                    mean.lerp_(parameter.grad, 1 - group["betas"][1])


class HeavyBall(torch.optim.Optimizer):
    """A third party's optimizer: a `momentum_buffer` and no setting that torch knows."""

    def __init__(self, parameters, lr=1e-2):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                parameter.sub_(buffer.mul_(0.9).add_(parameter.grad), alpha=self.param_groups[0]["lr"])


def optimizer_for(model, name):
    parameters = list(model.parameters())
    if name in ("Lion", "HeavyBall"):
        return globals()[name](parameters)
    kind = getattr(torch.optim, name.split()[0], None)
    if kind is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    if name == "Muon":  # takes matrices alone
        parameters = [parameter for parameter in parameters if parameter.dim() == 2]
    return kind(parameters, lr=0.01, **MOMENTUM_KEEPERS[name])


@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron", "global_momentum"])
@pytest.mark.parametrize("name", [*MOMENTUM_KEEPERS, "Lion", "HeavyBall"])
def test_sparse_momentum_with(name, growth):
    model = mlp(20, 30, 10)
    optimizer = optimizer_for(model, name)
    masking = masked(model, optimizer, growth_mode=growth)
    before = snapshot(masking)
    for _ in range(2):
        train(model, optimizer, 3)
        assert_masks_hold(masking)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
    assert masking.total_nonzero == 180
    assert masking.steps == 6
    for layer in masking.layers:
        momentum = masking.get_momentum_for_weight(layer.weight)
        assert momentum.shape == layer.weight.shape
        assert (momentum[~layer.mask] != 0).any(), "inactive weights have momentum too"
        assert not torch.equal(layer.mask, before[layer.name])


@pytest.mark.parametrize("redistribution", ["nonzeros", "magnitude", "none"])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "ASGD", "Rprop", "LBFGS"])
def test_without_momentum_the_error_names_choices_and_they_work(name, redistribution):
    model = mlp(20, 30, 10)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    with pytest.raises(RuntimeError, match=f"{name} holds no momentum") as error:
        masked(model, optimizer)
    assert "growth_mode='random' and redistribution_mode='nonzeros', 'magnitude' or 'none'" in str(error.value)

    model = mlp(20, 30, 10)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    masking = masked(model, optimizer, growth_mode="random", redistribution_mode=redistribution)
    inputs = torch.randn(8, 20)

    def closure():
        model.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        masking.step(closure)
        assert_masks_hold(masking)
        masking.at_end_of_epoch()
    assert masking.total_nonzero == 180
    assert masking.steps == 2


def test_a_momentum_in_every_group_is_asked_for():
    model = mlp(20, 30, 10)
    groups = [{"params": model.fc1.parameters()}, {"params": model.fc2.parameters(), "momentum": 0}]
    with pytest.raises(RuntimeError, match="SGD holds no momentum"):
        masked(model, torch.optim.SGD(groups, lr=0.1, momentum=0.9))
