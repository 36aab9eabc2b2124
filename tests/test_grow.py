"""The growth functions on examples small enough to check by eye."""

import pytest
import torch
from helpers import flat, grown, layer_with, masked, mlp, train, two_layers
from oracles import cht

from sparselearning import grow
from sparselearning.grow import (
    cannistraci_hebb_growth,
    global_momentum_growth,
    gradient_growth,
    guided_growth,
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


def test_guided_growth_adds_the_largest_gradients_of_what_was_drawn(monkeypatch):
    drawn, draw = [], grow.draw_connections
    monkeypatch.setattr(grow, "draw_connections", lambda *norms: drawn.append(draw(*norms)) or drawn[-1])
    for seed in range(50):
        torch.manual_seed(seed)
        active, gradient = torch.rand(8, 10) < 0.4, torch.randn(8, 10).mul_(2).round_()  # with ties
        masking = layer_with(active.float().tolist(), active.tolist())
        masking.layers[0].weight.grad = gradient
        mask = torch.tensor(grown(guided_growth, masking, 5))
        assert len(drawn[-1]) == int(active.sum()) + 5
        strength, flags = gradient.abs().flatten().tolist(), active.flatten().tolist()
        candidates = {i for i in drawn[-1].tolist() if not flags[i]}
        best = sorted(candidates, key=lambda i: (-strength[i], i))[:5]
        assert (mask & active == active).all()
        assert mask.sum() == active.sum() + 5
        assert {*best} <= {*(mask & ~active).flatten().nonzero().flatten().tolist()}


def test_guided_growth_draws_where_gradients_can_be_large():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0] = True
    masking = layer_with(mask.float().tolist(), mask.tolist())
    masking.layers[0].weight.grad = torch.tensor([0.0, 1, 3, 0]).outer(torch.tensor([1.0, 0, 0, -4, 0]))
    counts = torch.zeros(4, 5)
    for _ in range(400):
        counts += torch.tensor(grown(guided_growth, masking, 1)) & ~mask
    # Drawn six times: [2, 3] with a chance of 0.6 each, [1, 3] of 0.2, [2, 0] of 0.15 and [1, 0] of 0.05.
    expected = 400 * (1 - 0.4**6)
    assert counts[2, 3] == pytest.approx(expected, abs=10)
    assert counts[1, 3] + counts[2, 0] + counts[1, 0] == 400 - counts[2, 3]


def test_guided_growth_fills_up_at_random():
    mask = torch.eye(10, dtype=torch.bool)
    masking = layer_with(mask.float().tolist(), mask.tolist())
    gradient = torch.zeros(10, 10)
    gradient[2, 7] = 1e-20
    masking.layers[0].weight.grad = gradient
    counts = torch.zeros(10, 10)
    for _ in range(300):
        found = torch.tensor(grown(guided_growth, masking, 46))
        assert found.sum() == 56
        counts += found & ~mask
    assert counts[2, 7] == 300
    others = counts[~mask & (gradient == 0)]
    assert (others - 300 * 45 / 89).abs().max() < 45  # 5 standard deviations


def test_guided_growth_reads_gradients_of_every_size():
    for dtype, values in ((torch.float16, 60_000.0), (torch.float64, 1e300), (torch.float32, float("nan"))):
        masking = layer_with(torch.eye(10).tolist(), torch.eye(10, dtype=torch.bool).tolist())
        masking.get_gradient_for_weight = lambda weight, dtype=dtype, value=values: torch.full_like(
            weight, value, dtype=dtype
        )
        assert torch.tensor(grown(guided_growth, masking, 20)).sum() == 30


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
