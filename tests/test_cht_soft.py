"""The parts of CHTs: its link score, soft removal and regrowth, by hand and by how often they draw what."""

import pytest
import torch
from helpers import grown, layer_with, masked, mlp, pruned
from oracles import cht_soft

from sparselearning import CosineDecay, Masking
from sparselearning.functions import FunctionError
from sparselearning.grow import cannistraci_hebb_soft_growth, node_scores
from sparselearning.prune import soft_magnitude_prune

T, F = True, False
DRAWS = 3000


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        # Input 0 - output 0 - input 1 - output 1: each node between has one link to the other, (1 + 1) / (1 + 0).
        ([[T, T, F], [F, T, F], [F, F, T]], [[0, 0, 0], [4, 0, 0], [0, 0, 0]]),
        # Input 2 of output 0 leads elsewhere: output 0 counts (1 + 1) / (1 + 1) for link [1, 0], and input 1 as before.
        # Link [1, 2] likewise.
        ([[T, T, T], [F, T, F]], [[0, 0, 0], [3, 0, 3]]),
        # Two paths: output 0 has two links to others between, (1 + 2) / 1, and inputs 1 and 2 one each, 2 / 1.
        ([[T, T, T], [F, T, T]], [[0, 0, 0], [7, 0, 0]]),
        ([[T, F], [F, T]], [[0, 0], [0, 0]]),
    ],
)
def test_scores_by_hand(mask, score):
    assert node_scores(torch.tensor(mask)).tolist() == score


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.8])
def test_scores_are_those_of_a_loop_over_nodes(density):
    torch.manual_seed(0)
    mask = torch.rand(7, 9) < density
    torch.testing.assert_close(node_scores(mask), torch.tensor(cht_soft.scores(mask.flatten().tolist(), 7, 9)))


def frequencies(draw):
    """Return how often each set of places was drawn."""
    counts = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        places = frozenset(torch.tensor(draw()).flatten().nonzero().flatten().tolist())
        counts[places] = counts.get(places, 0) + 1 / DRAWS
    return counts


def assert_frequencies(found, expected):
    assert found.keys() <= expected.keys()
    for places, chance in expected.items():
        assert found.get(places, 0) == pytest.approx(chance, abs=5 * (chance / DRAWS) ** 0.5 + 1e-3), places


@pytest.mark.long
@pytest.mark.parametrize(("step", "progress"), [(0, 0.0), (50, 0.5), (100, 1.0), (150, 1.0)])
def test_weights_are_kept_in_proportion_to_a_power_of_their_magnitude(step, progress):
    """Of five weights two leave; the power goes from 1 to 9, and beyond the end of the decay it stays."""
    weight = [0.9, -0.5, 0.7, 0.0, -0.6, 0.8]
    masking = layer_with([weight], [[T, T, T, F, T, T]], prune_rate=0.4)
    masking.prune_rate_decay, masking.steps = CosineDecay(0.4, 100), step
    keeping = {i: cht_soft.keeping(abs(w), progress) for i, w in enumerate(weight) if w}
    sets = cht_soft.kept_sets(list(keeping.values()), 3)
    expected = {frozenset(list(keeping)[i] for i in chosen): chance for chosen, chance in sets.items()}
    assert_frequencies(frequencies(lambda: pruned(soft_magnitude_prune, masking)), expected)


@pytest.mark.long
def test_the_softness_stays_where_no_schedule_says_when_training_ends():
    masking = layer_with([[1.0, 2.0]])
    masking.prune_rate_decay, masking.steps = lambda step: 0.5, 10**6
    assert_frequencies(
        frequencies(lambda: pruned(soft_magnitude_prune, masking)), {frozenset({0}): 1 / 3, frozenset({1}): 2 / 3}
    )


def test_active_zeros_leave_first():
    masking = layer_with([[0.5, 0.0, 0.4, 0.0]], [[T, T, T, F]], prune_rate=1 / 3)
    assert all(pruned(soft_magnitude_prune, masking) == [[T, F, T, F]] for _ in range(50))


@pytest.mark.long
def test_links_come_in_proportion_to_their_score():
    """The links [1, 0], [1, 2] have scores 3 and 3, [2, 0]... those of the oracle; one comes."""
    mask = [[T, T, T, F], [F, T, F, F], [F, F, T, T]]
    score = [value for row in cht_soft.scores([x for row in mask for x in row], 3, 4) for value in row]
    masking = layer_with([[1.0] * 4] * 3, mask)
    active = {i for i, x in enumerate(x for row in mask for x in row) if x}
    expected = {frozenset(active | {i}): value / sum(score) for i, value in enumerate(score) if value}
    assert len(expected) > 3
    assert_frequencies(frequencies(lambda: grown(cannistraci_hebb_soft_growth, masking, 1)), expected)


def test_links_without_a_path_come_last():
    mask = torch.tensor([[T, T, F], [F, T, F], [F, F, T]])
    masking = layer_with([[1.0] * 3] * 3, mask.tolist())
    for _ in range(30):
        found = torch.tensor(grown(cannistraci_hebb_soft_growth, masking, 2))
        assert found.sum() == 6
        assert found[1, 0]


def test_a_sharded_layer_is_refused(monkeypatch):
    monkeypatch.setattr("sparselearning.grow.is_sharded", lambda mask: True)
    with pytest.raises(FunctionError, match="growth_mode='cannistraci_hebb_soft' follows paths through whole layers"):
        grown(cannistraci_hebb_soft_growth, layer_with([[1.0, 1.0]], [[T, F]]), 1)


def test_the_sigmoid_of_chtss_is_its_density_schedule():
    model = mlp(20, 30, 10)
    optimizer = torch.optim.Adam(model.parameters())
    parts = dict(density_schedule="sigmoid", start_density=0.5, prune_every_k_steps=2)
    masking = Masking.from_method("cht_soft", model, optimizer, 40, 0.1, **parts)
    seen = [masking.density]
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
        seen.append(masking.density)
    assert seen[0] == 0.5
    assert seen[14] == pytest.approx(0.3397, abs=2e-3)  # just before the middle, 15 of 30 steps: 0.5 - 0.4 * 0.4008
    assert seen[-1] == pytest.approx(0.1)
    assert seen == sorted(seen, reverse=True)
    masking.check()


def test_masks_and_rows_of_active_weights_draw_the_same():
    """A layer that holds its active weights alone draws as a masked one from the same random state."""
    masks, places = [], torch.arange(0, 72, 3)
    for in_a_row in (False, True):
        masking = masked(
            mlp(9, 8, 7), density=0.4, prune_mode="soft_magnitude", growth_mode="random", redistribution_mode="none"
        )
        layer = masking.layers[0]
        layer.prune_rate = 0.5
        torch.manual_seed(1)
        weight = torch.arange(1.0, 73).reshape(8, 9)
        mask = torch.zeros(72, dtype=torch.bool).index_fill(0, places, True).reshape(8, 9)
        given = (mask.flatten()[places], weight.flatten()[places]) if in_a_row else (mask, weight)
        kept = soft_magnitude_prune(masking, *given, layer.name)
        masks.append(kept if in_a_row else kept.flatten()[places])
    assert torch.equal(*masks)
