"""The prune, redistribute and grow functions on examples small enough to check by eye."""

import pytest
import torch
from helpers import assert_masks_hold, layer_with, masked, mlp, train

from sparselearning import CosineDecay
from sparselearning.grow import global_momentum_growth, momentum_growth, momentum_neuron_growth, random_growth
from sparselearning.prune import (
    global_magnitude_prune,
    magnitude_and_negativity_prune,
    magnitude_prune,
    threshold_prune,
)
from sparselearning.redistribute import (
    magnitude_redistribution,
    momentum_redistribution,
    no_redistribution,
    nonzero_redistribution,
)

T, F = True, False


def pruned(function, masking):
    """The mask of the only layer after a prune function."""
    layer = masking.layers[0]
    return function(masking, layer.mask, layer.weight, layer.name).tolist()


def grown(function, masking, count):
    """The mask of the only layer after a growth function."""
    layer = masking.layers[0]
    return function(masking, layer.name, layer.mask, count, layer.weight).tolist()


# Prune


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.5, [[T, F, T, F, F, F]]),  # of five active, ceil(2.5) leave
        (0.2, [[T, F, T, T, T, F]]),
        (0.0, [[T, T, T, T, T, F]]),
        (1.0, [[F, F, F, F, F, F]]),
    ],
)
def test_magnitude_prune(rate, expected):
    masking = layer_with([[0.9, -0.1, -0.8, 0.3, -0.2, 0.0]], [[T, T, T, T, T, F]], prune_rate=rate)
    assert pruned(magnitude_prune, masking) == expected


def test_active_zeros_are_pruned_first():
    masking = layer_with([[0.9, 0.0, -0.8, 0.0]], [[T, T, T, F]], prune_rate=1 / 3)
    assert pruned(magnitude_prune, masking) == [[T, F, T, F]]


@pytest.mark.parametrize(
    ("weight", "rate", "expected"),
    [
        ([0.1, 0.2, 0.9, -0.1, -0.3, -0.8], 2 / 6, [F, T, T, F, T, T]),  # smallest positive, largest negative
        ([0.1, 0.2, 0.9, -0.1, -0.3, -0.8], 3 / 6, [F, F, T, F, T, T]),  # the odd one is positive
        ([0.1, 0.2, 0.9, 0.4, 0.5, -0.8], 4 / 6, [F, F, T, F, T, F]),  # one negative only: three positive
        ([0.1, 0.2, 0.9, 0.4, 0.5, 0.8], 2 / 6, [F, F, T, T, T, T]),
        ([-0.1, -0.2, 0.0, -0.4, -0.5, -0.8], 2 / 6, [F, T, F, T, T, T]),  # an active zero counts as positive
    ],
)
def test_set_prunes_smallest_positive_and_largest_negative(weight, rate, expected):
    assert pruned(magnitude_and_negativity_prune, layer_with([weight], prune_rate=rate)) == [expected]


def two_layers(first, second, prune_rate=0.5):
    """A network of two linear layers with these weights, all active."""
    model = mlp(len(first), 1, len(second))
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([first]))
        model.fc2.weight.copy_(torch.tensor(second).unsqueeze(1))
    masking = masked(model, density=1.0, prune_rate=prune_rate)
    for layer in masking.layers:
        layer.prune_rate = prune_rate
    return masking


def flat(masks):
    return [mask.flatten().tolist() for mask in masks.values()]


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


# Redistribute


@torch.no_grad()
def test_importance_is_the_mean_over_active_weights():
    masking = layer_with([[1.0, -3.0], [5.0, 2.0]], [[T, T], [F, T]], momentum=[[1.0, -2.0], [9.0, 6.0]])
    layer = masking.layers[0]
    arguments = (masking, layer.name, layer.weight, layer.mask)
    assert float(momentum_redistribution(*arguments)) == 3  # (1 + 2 + 6) / 3
    assert float(magnitude_redistribution(*arguments)) == 2  # (1 + 3 + 2) / 3
    assert nonzero_redistribution(*arguments) == 3
    assert no_redistribution(*arguments) == 1


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


# Grow


def test_momentum_growth():
    masking = layer_with([[1.0, 0, 0, 0]], [[T, F, F, F]], momentum=[[9.0, 1.0, -3.0, 2.0]])
    assert grown(momentum_growth, masking, 2) == [[T, F, T, T]]


def test_random_growth_adds_exactly_the_count_and_every_entry_alike():
    masking = layer_with([[1.0] + 9 * [0.0]], [[T] + 9 * [F]])
    counts = torch.zeros(10)
    for _ in range(900):
        mask = torch.tensor(grown(random_growth, masking, 3))
        assert mask.sum() == 4
        counts += mask[0]
    assert counts[0] == 900
    assert (counts[1:] - 300).abs().max() < 75  # 5 standard deviations


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, [[T, T, T, T, F], [F, T, F, F, F]]),  # means 3 and 1: three for the first neuron, one for the second
        (6, [[T, T, T, T, T], [F, T, T, F, F]]),  # the first has room for four only
        (9, [[T, T, T, T, T], [T, T, T, T, T]]),
        (99, [[T, T, T, T, T], [T, T, T, T, T]]),
        (0, [[T, F, F, F, F], [F, F, F, F, F]]),
    ],
)
def test_momentum_neuron_growth(count, expected):
    momentum = [[3.0, 4.0, -3.0, 4.0, 1.0], [0.0, 3.0, -2.0, 0.0, 0.0]]
    masking = layer_with(torch.eye(2, 5).tolist(), [[T, F, F, F, F], [F, F, F, F, F]], momentum)
    assert grown(momentum_neuron_growth, masking, count) == expected


def test_global_momentum_grows_the_largest_of_the_network():
    masking = two_layers([0.0, 0.0, 0.0, 0.0], [0.0, 0.0])
    for mask in masking.masks.values():
        mask[:] = False
    for layer, momentum in zip(masking.layers, ([[1.0, -2.0, 3.0, 4.0]], [[-5.0], [0.5]]), strict=True):
        masking.optimizer.state[layer.weight]["momentum_buffer"] = torch.tensor(momentum)
    assert flat(global_momentum_growth(masking, 3)) == [[F, F, T, T], [T, F]]


# A whole update


def test_one_update_by_hand():
    masking = layer_with(
        [[0.5, -0.1, 0.0, 0.0, 0.2, 0.9]],
        [[T, T, F, F, T, T]],
        momentum=[[0.0, 0.3, 0.1, -0.4, 0.1, 0.0]],
    )
    masking.at_end_of_epoch()
    # Out go -0.1 and 0.2. In come the momenta -0.4 and 0.3: a weight that returns at once keeps its value.
    assert masking.masks["weight"].tolist() == [[T, T, F, T, F, T]]
    assert masking.layers[0].weight.tolist() == [pytest.approx([0.5, -0.1, 0.0, 0.0, 0.0, 0.9])]
    assert_masks_hold(masking)
