"""Train a small network whose layers have patterns."""

import torch
from helpers import assert_masks_hold, sgd, train
from torch import nn

from sparselearning import Masking

PATTERNS = ["2:4", "1:4", "block:4x2", "neuron", "fan-in", "fan-in:0.3"]
PLAIN = dict(prune_mode="magnitude", growth_mode="momentum", redistribution_mode="none")


def network():
    convolution = nn.Conv2d(4, 8, (1, 2)).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


def sparse(pattern, model=None, density=None, **modes):
    model = model or network()
    density = density or {"2:4": 0.5, "1:4": 0.2}.get(pattern, 0.3)
    masking = Masking(sgd(model), None, 0.3, **{**PLAIN, **modes})
    masking.add_module(model, density, "erdos_renyi_kernel", pattern=pattern)
    return model, masking


def move(model, masking, updates=1):
    for _ in range(updates):
        train(model, masking, steps=2, inputs=torch.randn(8, 4, 1, 5))
        masking.at_end_of_epoch()


def assert_pattern_holds(masking):
    assert_masks_hold(masking)
    masking.check()
    for layer in masking.layers:
        assert layer.pattern.holds(layer.mask), layer.name
        counts = layer.mask.flatten(1).sum(1)
        if layer.pattern.even:
            assert len(set(counts[counts > 0].tolist())) == 1
        elif layer.pattern.most:
            assert (layer.mask.reshape(-1, layer.pattern.group).sum(1) <= layer.pattern.most).all()
        elif layer.pattern.name == "neuron":
            assert set(counts.tolist()) <= {0, layer.mask[0].numel()}
