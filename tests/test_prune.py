"""The prune functions on examples small enough to check by eye, and a law for all of them."""

import pytest
import torch
from helpers import flat, layer_with, masked, mlp, pruned, same, snapshot, train, two_layers

from sparselearning import CosineDecay
from sparselearning.grow import rewiring_growth
from sparselearning.prune import (
    PRUNE_FUNCTIONS,
    adaptive_threshold_prune,
    global_magnitude_prune,
    gradual_magnitude_prune,
    magnitude_and_negativity_prune,
    magnitude_gradient_prune,
    magnitude_prune,
    sign_flip_prune,
    threshold_prune,
)

T, F = True, False


@pytest.mark.parametrize(
    ("weight", "mask", "rate", "expected"),
    [
        ([0.9, -0.1, -0.8, 0.3, -0.2, 0.0], [T, T, T, T, T, F], 0.5, [T, F, T, F, F, F]),  # of five, ceil(2.5) leave
        ([0.9, -0.1, -0.8, 0.3, -0.2, 0.0], [T, T, T, T, T, F], 0.2, [T, F, T, T, T, F]),
        ([0.9, -0.1, -0.8, 0.3, -0.2, 0.0], [T, T, T, T, T, F], 0.0, [T, T, T, T, T, F]),
        ([0.9, -0.1, -0.8, 0.3, -0.2, 0.0], [T, T, T, T, T, F], 1.0, [F, F, F, F, F, F]),
        ([0.9, 0.0, -0.8, 0.0], [T, T, T, F], 1 / 3, [T, F, T, F]),  # an active zero is the first to leave
    ],
)
def test_magnitude_prunes_the_smallest(weight, mask, rate, expected):
    assert pruned(magnitude_prune, layer_with([weight], [mask], prune_rate=rate)) == [expected]


@pytest.mark.parametrize(
    ("weight", "rate", "expected"),
    [
        ([0.1, 0.2, 0.9, -0.1, -0.3, -0.8], 2 / 6, [F, T, T, F, T, T]),  # smallest positive, largest negative
        ([0.1, 0.2, 0.9, -0.1, -0.3, -0.8], 3 / 6, [F, F, T, F, T, T]),  # the odd one is positive
        ([0.1, 0.2, 0.9, 0.4, 0.5, -0.8], 4 / 6, [F, F, T, F, T, F]),  # 3.3 of five positive, 0.7 of one negative
        ([0.1, 0.2, 0.9, 0.4, -0.5, -0.8], 4 / 6, [F, F, T, F, F, T]),  # 2.7 of four, 1.3 of two; not two and two
        ([0.1, 0.2, 0.9, 0.4, 0.5, 0.8], 2 / 6, [F, F, T, T, T, T]),
        ([-0.1, -0.2, 0.0, 0.4, -0.5, -0.8], 2 / 6, [F, T, F, T, T, T]),  # an active zero counts as positive
        ([-0.1, -0.2, -0.3, -0.4, -0.5, 0.8], 2 / 6, [F, F, T, T, T, T]),  # 1.7 of five negative, 0.3 of one positive
    ],
)
def test_set_prunes_smallest_positive_and_largest_negative(weight, rate, expected):
    """Release 1.0 removed 75% at a rate of 0.5, all positive weights among them."""
    assert pruned(magnitude_and_negativity_prune, layer_with([weight], prune_rate=rate)) == [expected]


def test_global_magnitude_prunes_the_smallest_of_the_network():
    masking = two_layers([0.1, -0.2, 0.3, 0.4], [0.5, -0.6])
    assert flat(global_magnitude_prune(masking)) == [[F, F, F, T], [T, T]]


def test_threshold_moves_to_the_prune_rate_and_stays_where_it_is_close():
    masking = two_layers([0.1, -0.2, 0.3, 0.4], [0.5, -0.6])
    assert flat(threshold_prune(masking)) == [[F, F, F, T], [T, T]]  # 0.001 would have pruned none of three
    assert masking.prune_threshold == pytest.approx(0.3)
    masking = two_layers([0.31, -0.2, 0.3, 0.0], [0.5, -0.6])
    masking.prune_threshold = 0.3  # prunes three of three
    threshold_prune(masking)
    assert masking.prune_threshold == 0.3


def test_threshold_follows_the_prune_rate_within_two_percent():
    model = mlp(40, 100, 20)
    decay = CosineDecay(0.5, T_max=20)
    masking = masked(model, density=0.5, prune_mode="threshold", redistribution_mode="none", prune_rate_decay=decay)
    for step in range(1, 20):
        train(model, masking, steps=1)
        masking.at_end_of_epoch()
        assert masking.total_removed == pytest.approx(decay(step) * 3000, rel=0.02, abs=2)


def test_adaptive_threshold_doubles_and_halves():
    weight = [[0.1, -0.2, 0.3, 0.4], [0.5, -0.6, 0.7, 0.8]]
    masking = layer_with(weight, prune_rate=0.5)  # 4 of 8
    masking.prune_threshold = 0.15
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, T, T, T], [T, T, T, T]]
    assert masking.prune_threshold == 0.3
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, F, T, T], [T, T, T, T]]
    assert masking.prune_threshold == 0.6
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, F, F, F], [F, T, T, T]]
    assert masking.prune_threshold == 0.3
    masking.prune_threshold = 0.45
    adaptive_threshold_prune(masking)  # as many as intended
    assert masking.prune_threshold == 0.45


def test_a_layer_below_the_threshold_keeps_its_largest_weight():
    masking = two_layers([0.1, -0.2, 0.3, 0.1], [0.5, -0.6])
    masking.prune_threshold = 0.4
    assert flat(adaptive_threshold_prune(masking)) == [[F, F, T, F], [T, T]]
    assert masking.prune_threshold == 0.4, "three left, of three intended"


def test_magnitude_and_gradient_together_rank_weights():
    masking = layer_with([[0.5, 0.4, 0.3, 0.0]], [[T, T, T, F]], prune_rate=1 / 3)
    layer = masking.layers[0]
    layer.weight.grad = torch.tensor([[0.0, 5.0, 30.0, 0.0]])  # scores 0.5, 0.45 and 0.6
    assert magnitude_gradient_prune(masking, layer.mask, layer.weight, "weight").tolist() == [[T, F, T, F]]


def test_weights_that_change_sign_leave_and_new_ones_have_a_sign_to_keep():
    masking = layer_with([[0.5, -0.4, 0.3, 0.0]], [[T, T, T, F]])
    layer = masking.layers[0]
    assert sign_flip_prune(masking, layer.mask, layer.weight, "weight").tolist() == [[T, T, T, F]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.1, -0.2, 0.0, 0.0]]))
    layer.mask.copy_(sign_flip_prune(masking, layer.mask, layer.weight, "weight"))
    assert layer.mask.tolist() == [[F, T, F, F]]
    layer.mask.copy_(rewiring_growth(masking, "weight", layer.mask, 3, layer.weight))
    assert layer.mask.all()
    signs = layer.memory["sign"][0].tolist()
    assert signs[:3] == [1, -1, 1], "a connection that comes back has the sign that it had"
    assert abs(signs[3]) == 1
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.2, -0.3, 0.4 * signs[3]]]))
    assert sign_flip_prune(masking, layer.mask, layer.weight, "weight").tolist() == [[T, F, F, T]]
    assert layer.memory["sign"][0].tolist() == signs


def test_gradual_pruning_falls_everywhere_and_then_moves_in_each_layer():
    model = mlp(4, 1, 4)
    masking = masked(model, density=1.0, prune_rate=0.5)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.9]]))
        model.fc2.weight.copy_(torch.tensor([[0.4], [0.5], [0.6], [0.7]]))
    masking.baseline_nonzero = 6
    masks = gradual_magnitude_prune(masking)
    # 0.1 and 0.2 are the smallest of all; of the two and four that are left half go.
    assert masks["fc1.weight"].tolist() == [[F, F, F, T]]
    assert masks["fc2.weight"].flatten().tolist() == [F, F, T, T]


# These compare all weights anew, whatever the prune rate.
BY_RATE = PRUNE_FUNCTIONS.keys() - {"sign_flip", "dense_magnitude", "global_dense_magnitude"}


@pytest.mark.parametrize("prune_mode", sorted(BY_RATE))
def test_a_prune_rate_of_zero_moves_nothing(prune_mode):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode=prune_mode, prune_rate=0)
    train(model, masking)
    with torch.no_grad():
        # Active zeros stay active. Release 1.0 kept `weight != 0`, and so dropped what had just grown.
        model.fc1.weight[masking.masks["fc1.weight"]] = 0
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert same(before, masking.masks)
