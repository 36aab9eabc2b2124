"""drop_lowest, add_highest, apportion: golden examples, and laws against slow loops."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import reference

from sparselearning import selection
from sparselearning.selection import (
    add_highest,
    add_highest_jointly,
    apportion,
    drop_lowest,
    drop_lowest_jointly,
)

inf, nan = torch.inf, torch.nan
T, F = True, False


@pytest.fixture(params=["cpu", "device"], autouse=True)
def path(request, monkeypatch):
    """Run every test through the selection for CPUs and through the one that never waits for a device."""
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


APPORTIONED = [
    # total, shares, capacity, expected
    (10, [1, 1, 2], [9, 9, 9], [3, 2, 5]),  # quotas 2.5, 2.5, 5: of equal remainders the earlier
    (10, [1, 1, 2], [9, 9, 3], [4, 3, 3]),  # what the full part cannot take goes to the others
    (3, [1, 1, 1, 1], [9, 9, 9, 9], [1, 1, 1, 0]),
    (7, [5, 1, 1], [0, 9, 9], [0, 4, 3]),
    (6, [1, 0], [3, 3], [3, 3]),  # a part without share takes what nobody else can
    (5, [0, 0], [9, 9], [3, 2]),  # no shares at all count as equal shares
    (0, [1, 2], [3, 3], [0, 0]),
    (0, [], [], []),
    (6, [0.1, 0.2], [3, 3], [3, 3]),
    (3, [1e-300, 3e-300], [9, 9], [1, 2]),
    (3, [1e308, 1e308, 1e308], [9, 9, 9], [1, 1, 1]),  # their sum is beyond float64
    (8, [1, 4, 1], [9, 9, 9], [2, 5, 1]),  # quotas 4/3, 16/3, 4/3: three equal remainders
]


@pytest.mark.parametrize(("total", "shares", "capacity", "expected"), APPORTIONED)
def test_apportion(total, shares, capacity, expected):
    assert apportion(total, shares, capacity) == expected == reference.apportion(total, shares, capacity)


parts = st.lists(
    st.tuples(st.integers(0, 30) | st.floats(0, 1e300, allow_subnormal=False), st.integers(0, 50)),
    min_size=1,
    max_size=12,
)


@one_path_per_test
@given(parts, st.floats(0, 1))
@example([(0.1, 9), (0.3, 9)], 0.5)
def test_apportioned_units_sum_to_the_total_within_capacities(parts, fraction):
    shares, capacity = map(list, zip(*parts, strict=True))
    total = round(fraction * sum(capacity))
    counts = apportion(total, shares, capacity)
    assert sum(counts) == total
    assert all(type(count) is int and 0 <= count <= room for count, room in zip(counts, capacity, strict=True))


@one_path_per_test
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=12), st.floats(0, 1))
def test_apportion_equals_exact_fractions(parts, fraction):
    shares, capacity = map(list, zip(*parts, strict=True))
    total = round(fraction * sum(capacity))
    assert apportion(total, shares, capacity) == reference.apportion(total, shares, capacity)


@one_path_per_test
@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=12), st.integers(0, 10**12))
def test_apportion_keeps_to_its_quotas_where_there_is_room(shares, total):
    counts = apportion(total, shares, [10**13] * len(shares))
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1 + 1e-9 * total


@pytest.mark.parametrize(
    ("total", "shares", "capacity", "message"),
    [
        (7, [1, 1], [3, 3], "Cannot place 7 units in parts that hold 6"),
        (-1, [1, 1], [3, 3], "Cannot place -1 units"),
        (1, [1, -1], [3, 3], "Shares must be finite and not negative"),
        (1, [1, nan], [3, 3], "Shares must be finite and not negative"),
        (1, [1, inf], [3, 3], "Shares must be finite and not negative"),
    ],
)
def test_apportion_refuses(total, shares, capacity, message):
    with pytest.raises(ValueError, match=message):
        apportion(total, shares, capacity)


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_ranks_beyond_the_largest_number_beside_nan(sign, device, monkeypatch):
    if device:
        monkeypatch.setattr(selection, "_mark_lowest_on_cpu", selection._mark_lowest_on_device)
    largest = torch.finfo(torch.float32).max
    score = sign * torch.tensor([largest, torch.inf, torch.nan, 0.0])
    mask = torch.tensor([False] * 4)
    if sign > 0:
        assert add_highest(score, mask, 1).tolist() == [False, True, False, False]
    else:
        assert drop_lowest(score, ~mask, 2).tolist() == [True, False, False, True]  # NaN first, then -inf


def test_the_largest_remainder_comes_first_and_of_equals_the_earlier():
    assert apportion(1, [0.30, 0.36, 0.34], [1, 1, 1]) == [0, 1, 0]
    assert apportion(50, [1] * 100, [9] * 100) == [1] * 50 + [0] * 50
