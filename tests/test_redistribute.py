"""The importance that redistribute functions give a layer, by hand."""

import pytest
import torch
from helpers import layer_with, masked, mlp

from sparselearning.functions import after_pruning
from sparselearning.redistribute import (
    magnitude_redistribution,
    momentum_redistribution,
    no_redistribution,
    nonzero_redistribution,
    remaining_redistribution,
)

T, F = True, False


@torch.no_grad()
@pytest.mark.parametrize(
    ("measure", "importance"),
    [
        (momentum_redistribution, 3),  # (1 + 2 + 6) / 3
        (magnitude_redistribution, 2),  # (1 + 3 + 2) / 3
        (nonzero_redistribution, 3),
        (remaining_redistribution, 3),
        (no_redistribution, 1),
    ],
)
def test_importance_by_hand(measure, importance):
    masking = layer_with([[1.0, -3.0], [5.0, 2.0]], [[T, T], [F, T]], momentum=[[1.0, -2.0], [9.0, 6.0]])
    layer = masking.layers[0]
    assert float(measure(masking, layer.name, layer.weight, layer.mask)) == importance


@torch.no_grad()
@pytest.mark.parametrize("measure", [momentum_redistribution, magnitude_redistribution])
def test_a_layer_without_active_weights_has_no_importance(measure):
    masking = layer_with([[1.0, 2.0]], [[F, F]], momentum=[[1.0, 2.0]])
    assert float(measure(masking, "weight", masking.layers[0].weight, masking.layers[0].mask)) == 0


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_means_do_not_overflow(dtype):
    model = mlp(400, 400).to(dtype)
    torch.nn.init.ones_(model.fc1.weight)
    masking = masked(model, density=1.0)
    layer = masking.layers[0]
    assert float(magnitude_redistribution(masking, layer.name, layer.weight, layer.mask)) == 1


def test_remaining_counts_what_pruning_left():
    model = mlp(20, 30, 10)
    seen = {}

    @after_pruning
    def measure(masking, name, weight, mask):
        seen.setdefault(name, []).append(remaining_redistribution(masking, name, weight, mask))
        return nonzero_redistribution(masking, name, weight, mask)

    masking = masked(model, redistribution_mode=measure)
    masking.at_end_of_epoch()
    assert seen == {"fc1.weight": [120, 60], "fc2.weight": [60, 30]}
