"""drop_lowest and add_highest, on one mask and on several: golden examples, and laws against slow loops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import reference

from sparselearning import selection
from sparselearning.selection import (
    add_highest,
    add_highest_jointly,
    drop_lowest,
    drop_lowest_jointly,
)

inf, nan = torch.inf, torch.nan
T, F = True, False


@pytest.fixture(params=["cpu", "device"], autouse=True)
def path(request, monkeypatch):
    """Run every test with the selection for CPUs and with the one that never waits for a device."""
    if request.param == "device":
        monkeypatch.setattr(selection, "_mark_lowest_on_cpu", selection._mark_lowest_on_device)


one_path_per_test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

DROPPED = [
    # score                   mask             k  expected
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], 1, [T, F, T, F]),  # the lowest active one; the inactive 0 is none
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], 2, [T, F, F, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], 0, [T, T, T, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], -1, [T, T, T, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], 3, [F, F, F, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, T, T, F], 9, [F, F, F, F]),  # fewer than k: all
    ([1.0, 1.0, 1.0, 1.0], [T, F, T, T], 2, [F, F, F, T]),  # equals: the earlier first
    ([0.0, -0.0, 0.0, 1.0], [T, T, T, T], 2, [F, F, T, T]),  # -0.0 equals 0.0
    ([2.0, nan, 1.0, -inf], [T, T, T, F], 1, [T, F, T, F]),  # NaN ranks below every number
    ([-inf, 0.0, inf, 5.0], [T, T, T, T], 1, [F, T, T, T]),
    ([1.0, 2.0, 3.0, 4.0], [F, F, F, F], 2, [F, F, F, F]),
]
ADDED = [
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], 1, [T, F, T, F]),  # the highest inactive one; the active 3 is none
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], 2, [T, T, T, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], 0, [T, F, F, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], -1, [T, F, F, F]),
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], 3, [T, T, T, T]),
    ([3.0, 1.0, 2.0, 0.0], [T, F, F, F], 9, [T, T, T, T]),  # fewer than k: all
    ([0.0, 0.0, 0.0, 0.0], [F, T, F, F], 2, [T, T, T, F]),  # equals, also at zero: the earlier first
    ([nan, 2.0, -9.0, 1.0], [F, T, F, F], 2, [F, T, T, T]),  # NaN ranks below every number
    ([nan, 2.0, -9.0, 1.0], [F, T, F, F], 3, [T, T, T, T]),  # but what is asked for is added
    ([inf, 0.0, -inf, 5.0], [F, F, F, F], 1, [T, F, F, F]),
    ([1.0, 2.0, 3.0, 4.0], [T, T, T, T], 2, [T, T, T, T]),
]


@pytest.mark.parametrize(("score", "mask", "k", "expected"), DROPPED)
def test_drop_lowest(score, mask, k, expected):
    assert drop_lowest(torch.tensor(score), torch.tensor(mask), k).tolist() == expected


@pytest.mark.parametrize(("score", "mask", "k", "expected"), ADDED)
def test_add_highest(score, mask, k, expected):
    assert add_highest(torch.tensor(score), torch.tensor(mask), k).tolist() == expected


def test_one_budget_for_several_masks():
    scores = [torch.tensor([1.0, 4.0]), torch.tensor([[2.0], [3.0], [2.0]])]
    full = [torch.ones(2, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)]
    kept = drop_lowest_jointly(scores, full, 2)
    assert [mask.flatten().tolist() for mask in kept] == [[F, T], [F, T, T]]
    grown = add_highest_jointly(scores, [~mask for mask in full], 2)
    assert [mask.flatten().tolist() for mask in grown] == [[F, T], [F, T, F]]
    assert grown[1].shape == (3, 1)


def test_one_budget_for_masks_of_several_dtypes():
    scores = [torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.bfloat16)]
    full = [torch.ones(2, dtype=torch.bool)] * 2
    assert [mask.tolist() for mask in drop_lowest_jointly(scores, full, 2)] == [[F, T], [F, T]]


def test_arguments_are_left_alone():
    score, mask = torch.tensor([3.0, nan, 2.0]), torch.tensor([T, T, F])
    for verb in (drop_lowest, add_highest):
        for k in (0, 1, 5):
            result = verb(score, mask, k)
            result.logical_not_()  # a new tensor, even if nothing moved
            assert mask.tolist() == [T, T, F]
            assert score[[0, 2]].tolist() == [3, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_scores_of_every_dtype(dtype):
    score, mask = torch.tensor([3, 1, 2, 0]).to(dtype), torch.tensor([T, T, F, F])
    assert drop_lowest(score, mask, 1).tolist() == [T, F, F, F]
    assert add_highest(score, mask, 1).tolist() == [T, T, T, F]


def test_scores_that_require_a_gradient():
    score = torch.tensor([3.0, 1.0], requires_grad=True)
    assert drop_lowest(score, torch.tensor([T, T]), 1).tolist() == [T, F]


def test_equals_are_taken_in_row_major_order_in_any_memory_layout():
    score, mask = torch.ones(2, 3, 4, 5), torch.rand(2, 3, 4, 5) < 0.5
    expected = drop_lowest(score, mask, 20)
    laid_out = mask.to(memory_format=torch.channels_last)
    for layout in (score, score.to(memory_format=torch.channels_last)):
        result = drop_lowest(layout, laid_out, 20)
        assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


few_scores = st.sampled_from([-inf, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, inf])  # few values: many ties
entries = st.lists(st.tuples(few_scores | st.floats(width=32, allow_nan=False), st.booleans()), min_size=1, max_size=40)


@one_path_per_test
@given(entries, st.integers(-2, 45))
def test_selection_equals_a_slow_loop(entries, k):
    score, mask = map(list, zip(*entries, strict=True))
    k_or_none = max(k, 0)
    dropped = drop_lowest(torch.tensor(score), torch.tensor(mask), k).tolist()
    assert dropped == reference.drop_lowest(score, mask, k_or_none)
    added = add_highest(torch.tensor(score), torch.tensor(mask), k).tolist()
    assert added == reference.add_highest(score, mask, k_or_none)


@one_path_per_test
@given(st.lists(entries, min_size=1, max_size=4), st.integers(0, 60))
def test_a_joint_selection_is_one_over_the_joined_entries(parts, k):
    scores = [torch.tensor([score for score, _ in part]) for part in parts]
    masks = [torch.tensor([active for _, active in part]) for part in parts]
    for jointly, alone in ((drop_lowest_jointly, drop_lowest), (add_highest_jointly, add_highest)):
        assert torch.equal(torch.cat(jointly(scores, masks, k)), alone(torch.cat(scores), torch.cat(masks), k))


SCORES = {
    "all different": lambda n: torch.randn(n),
    "float64": lambda n: torch.randn(n, dtype=torch.float64),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "mostly zero": lambda n: torch.randn(n) * (torch.rand(n) < 0.01),
    "all equal": torch.ones,
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "one NaN in ten": lambda n: torch.randn(n).where(torch.rand(n) < 0.9, nan),
    "infinite ends": lambda n: torch.randn(n).mul(5).sinh().div(1e-30).where(torch.rand(n) < 0.9, -inf),
}


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("scores", SCORES)
def test_selection_among_many_equals_a_stable_sort(scores, density):
    size = 150_001
    score, mask = SCORES[scores](size), torch.rand(size) < density
    lowest_first = score.nan_to_num(nan=-inf, posinf=inf, neginf=-inf)
    active = mask.nonzero().flatten()
    by_score = active[lowest_first[active].argsort(stable=True)]
    inactive = (~mask).nonzero().flatten()
    by_descending_score = inactive[(-lowest_first[inactive]).argsort(stable=True)]
    for k in (1, 7, len(active) // 2, len(active) - 1):
        dropped = (mask & ~drop_lowest(score, mask, k)).nonzero().flatten()
        assert torch.equal(dropped, by_score[:k].sort().values), f"drop {k}"
    for k in (1, 7, len(active) // 2, len(inactive) - 1):
        added = (~mask & add_highest(score, mask, k)).nonzero().flatten()
        assert torch.equal(added, by_descending_score[:k].sort().values), f"add {k}"


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_ranks_beyond_the_largest_number_beside_nan(sign):
    largest = torch.finfo(torch.float32).max
    score = sign * torch.tensor([largest, torch.inf, torch.nan, 0.0])
    mask = torch.tensor([False] * 4)
    if sign > 0:
        assert add_highest(score, mask, 1).tolist() == [False, True, False, False]
    else:
        assert drop_lowest(score, ~mask, 2).tolist() == [True, False, False, True]  # NaN first, then -inf
