"""apportion divides a total: golden examples, and laws against exact fractions."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import reference

from sparselearning.selection import apportion

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
    (1, [0.30, 0.36, 0.34], [1, 1, 1], [0, 1, 0]),
    (50, [1] * 100, [9] * 100, [1] * 50 + [0] * 50),
]


@pytest.mark.parametrize(("total", "shares", "capacity", "expected"), APPORTIONED)
def test_apportion(total, shares, capacity, expected):
    assert apportion(total, shares, capacity) == expected


parts = st.lists(
    st.tuples(st.integers(0, 30) | st.floats(0, 1e300, allow_subnormal=False), st.integers(0, 50)),
    min_size=1,
    max_size=12,
)


@given(parts, st.floats(0, 1))
@example([(0.1, 9), (0.3, 9)], 0.5)
def test_apportioned_units_sum_to_the_total_within_capacities(parts, fraction):
    shares, capacity = map(list, zip(*parts, strict=True))
    total = round(fraction * sum(capacity))
    counts = apportion(total, shares, capacity)
    assert sum(counts) == total
    assert all(type(count) is int and 0 <= count <= room for count, room in zip(counts, capacity, strict=True))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=12), st.floats(0, 1))
def test_apportion_equals_exact_fractions(parts, fraction):
    shares, capacity = map(list, zip(*parts, strict=True))
    total = round(fraction * sum(capacity))
    assert apportion(total, shares, capacity) == reference.apportion(total, shares, capacity)


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
        (1, [1, math.nan], [3, 3], "Shares must be finite and not negative"),
        (1, [1, math.inf], [3, 3], "Shares must be finite and not negative"),
    ],
)
def test_apportion_refuses(total, shares, capacity, message):
    with pytest.raises(ValueError, match=message):
        apportion(total, shares, capacity)
