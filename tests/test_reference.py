"""The library equals a slow loop written from the equations, bit for bit, over 50 steps."""

import copy

import pytest
import torch
from helpers import backward, masked, mlp
from oracles import reference
from torch import nn

from sparselearning import CosineDecay

STEPS, EVERY = 50, 5


class SlowMasking:
    """Sparse momentum by reference.update, with weights copied to lists and back."""

    def __init__(self, weights, masks, momentum):
        self.weights, self.masks, self.momentum = weights, masks, momentum
        self.apply()

    def apply(self):
        for weight, mask in zip(self.weights, self.masks, strict=True):
            values = [value if active else 0.0 for value, active in zip(weight.flatten().tolist(), mask, strict=True)]
            with torch.no_grad():
                weight.copy_(torch.tensor(values).reshape(weight.shape))

    def update(self, prune_rate):
        weights = [weight.flatten().tolist() for weight in self.weights]
        momenta = [self.momentum(weight).flatten().tolist() for weight in self.weights]
        self.masks = reference.update(weights, momenta, self.masks, prune_rate)
        self.apply()


def sgd_momentum(optimizer):
    return lambda weight: optimizer.state[weight]["momentum_buffer"]


def adam_momentum(optimizer):
    return lambda weight: optimizer.state[weight]["exp_avg"] / (optimizer.state[weight]["exp_avg_sq"].sqrt() + 1e-8)


def linear():
    """Return a network and inputs with many ties: inputs that are always zero, and neurons of equal weights."""
    model = mlp(12, 16, 10, 4)
    with torch.no_grad():
        for weight in (model.fc1.weight, model.fc2.weight, model.fc3.weight):
            weight.copy_((weight * 8).round() / 8)
        model.fc1.weight[1::2] = model.fc1.weight[::2]
        model.fc2.weight[:, 1::2] = model.fc2.weight[:, ::2]
    inputs = torch.randint(-2, 3, (STEPS, 6, 12)).float()
    inputs[:, :, [0, 7]] = 0
    return model, inputs


def convolutional():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6))
    return model, torch.randn(STEPS, 6, 2, 4, 4)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("network", [linear, convolutional])
@pytest.mark.parametrize(
    ("make_optimizer", "momentum_in"),
    [
        (lambda parameters: torch.optim.SGD(parameters, lr=0.125, momentum=0.5), sgd_momentum),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True), sgd_momentum),
        (lambda parameters: torch.optim.Adam(parameters, lr=0.01), adam_momentum),
    ],
    ids=["sgd", "nesterov", "adam"],
)
def test_fifty_steps_equal_the_slow_loop(make_optimizer, momentum_in, network, density):
    model, inputs = network()
    twin = copy.deepcopy(model)
    decay = CosineDecay(0.5, STEPS)

    masking = masked(
        model, make_optimizer(model.parameters()), density, prune_rate_decay=decay, prune_every_k_steps=EVERY
    )

    optimizer = make_optimizer(twin.parameters())
    weights = [parameter for parameter in twin.parameters() if parameter.dim() > 1]
    masks = [mask.flatten().tolist() for mask in masking.masks.values()]
    slow = SlowMasking(weights, masks, momentum_in(optimizer))

    for step in range(1, STEPS + 1):
        backward(model, inputs[step - 1])
        masking.step()
        backward(twin, inputs[step - 1])
        optimizer.step()
        slow.apply()
        if step % EVERY == 0:
            slow.update(decay(step))
        assert [mask.flatten().tolist() for mask in masking.masks.values()] == slow.masks, (
            f"masks differ at step {step}"
        )
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, other), f"weights differ at step {step}"
