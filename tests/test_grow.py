"""The growth functions on examples small enough to check by eye."""

import pytest
import torch
from helpers import flat, grown, layer_with, masked, mlp, train, two_layers
from oracles import cht

from sparselearning.grow import (
    cannistraci_hebb_growth,
    global_momentum_growth,
    gradient_growth,
    momentum_growth,
    momentum_neuron_growth,
    path_scores,
    random_growth,
)

T, F = True, False


@pytest.mark.parametrize(
    ("mask", "momentum", "expected"),
    [
        ([T, F, F, F], [9.0, 1.0, -3.0, 2.0], [T, F, T, T]),
        (
            [T, T, F, F],
            [5.0, 5.0, 0.0, 0.0],
            [T, T, T, T],
        ),  # in release 1.0 active weights took part, with a score of 0
    ],
)
def test_momentum_adds_the_inactive_weights_of_largest_momentum(mask, momentum, expected):
    masking = layer_with([[float(active) for active in mask]], [mask], [momentum])
    assert grown(momentum_growth, masking, 2) == [expected]


def test_gradient_adds_the_inactive_weights_of_largest_gradient():
    masking = layer_with([[1.0, 0, 0, 0]], [[T, F, F, F]])
    masking.layers[0].weight.grad = torch.tensor([[9.0, 1.0, -3.0, 2.0]])
    assert grown(gradient_growth, masking, 2) == [[T, F, T, T]]


def test_gradient_growth_without_gradient_says_what_to_do():
    model = mlp(5, 5)
    masking = masked(model, growth_mode="gradient")
    train(model, masking)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"shape \(5, 5\) has no gradient.*prune_every_k_steps=100"):
        masking.at_end_of_epoch()


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
def test_momentum_neuron_divides_the_count_among_neurons(count, expected):
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


def test_path_scores_are_those_of_a_loop_over_paths():
    torch.manual_seed(0)
    for density in (0.2, 0.5, 0.8):
        mask = torch.rand(7, 9) < density
        torch.testing.assert_close(path_scores(mask), torch.tensor(cht.scores(mask.flatten().tolist(), 7, 9)))


def test_a_path_of_length_three_brings_its_link():
    # Output 0 has inputs 0 and 1, output 1 has input 1: input 0 - output 0 - input 1 - output 1 closes with [1, 0].
    mask = torch.tensor([[T, T, F], [F, T, F], [F, F, T]])
    assert path_scores(mask).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    masking = layer_with([[0.0] * 3] * 3, mask.tolist())
    grown = cannistraci_hebb_growth(masking, "weight", mask, 1, masking.layers[0].weight)
    assert (grown ^ mask).nonzero().tolist() == [[1, 0]]
