"""What full layers cannot take goes to the others in equal parts, as release 1.0 divides it."""

import math
import random
from types import SimpleNamespace

import pytest
from oracles import reference

from sparselearning.budget import redistribute
from sparselearning.patterns import UNSTRUCTURED, pattern_for


def layers_of(importance, rooms, pattern=UNSTRUCTURED):
    return [
        SimpleNamespace(importance=part / sum(importance), room=room, pattern=pattern, removed=0, nonzeros=1)
        for part, room in zip(importance, rooms, strict=True)
    ]


def loop_of_release_1_0(total, importance, rooms):
    """Return the numbers of weights by the loop of 1.0, with its floats, its limit of 1000 rounds and its rounding."""
    grown = [math.ceil(part / sum(importance) * total) for part in importance]
    excess, mean_excess, rounds = 1.0, 0.0, 0
    while excess > 0 and rounds < 1000:
        excess = 0.0
        for i, room in enumerate(rooms):
            grown[i] += mean_excess
            if grown[i] > 0.99 * room:
                excess += grown[i] - 0.99 * room
                grown[i] = 0.99 * room
        mean_excess = excess / len(grown)
        rounds += 1
    return [math.floor(number) for number in grown]


@pytest.mark.parametrize(
    ("lacking", "importance", "rooms", "expected"),
    [
        (100, [60, 30, 10], [10_000, 10_000, 10_000], [60, 30, 10]),  # nothing is full
        (100, [60, 30, 10], [41, 1000, 1000], [40, 40, 20]),  # 40 fit of 60: 10 to each other layer, not 15 and 5
        (100, [60, 30, 10], [41, 36, 1000], [40, 35, 25]),  # the second fills up by its part
        (100, [100, 0, 0], [51, 1000, 1000], [50, 25, 25]),  # layers of importance zero take equal parts
        (100, [60, 30, 10], [0, 1000, 1000], [0, 60, 40]),
        (100, [60, 30, 10], [50, 25, 25], [50, 25, 25]),  # 99% of the room is too little
        (101, [60, 30, 10], [41, 1000, 1000], [40, 41, 20]),  # 40.6 and 20.4
    ],
)
def test_excess_is_divided_in_equal_parts(lacking, importance, rooms, expected):
    assert redistribute(lacking, layers_of(importance, rooms)) == expected


@pytest.mark.parametrize(
    ("lacking", "importance", "rooms", "expected"),
    [
        (100, [60, 30, 10], [40, 1000, 1000], [40, 45, 15]),  # 40 fit of 60, and a layer fills up: 60 as 30 to 10
        (100, [60, 30, 10], [40, 45, 15], [40, 45, 15]),
        (10, [2, 1, 1], [6, 3, 0], [7, 3, 0]),
    ],
)
def test_dsr_divides_the_excess_in_proportion(lacking, importance, rooms, expected):
    rooms = [max(room, count) for room, count in zip(rooms, expected, strict=True)]
    assert redistribute(lacking, layers_of(importance, rooms), in_proportion=True) == expected


def test_excess_of_blocks_is_divided_in_blocks():
    layers = layers_of([60, 30, 10], [164, 4000, 4000], pattern_for("block:2x2", (100, 100)))
    assert redistribute(400, layers) == [160, 160, 80]


def cases():
    draw = random.Random(0)
    for _ in range(300):
        number = draw.randint(1, 6)
        importance = [draw.choice([0.0, draw.random(), draw.random() ** 4]) for _ in range(number - 1)] + [
            draw.random()
        ]
        rooms = [draw.choice([0, draw.randint(1, 50), draw.randint(50, 5000)]) for _ in range(number)]
        yield draw.randint(0, sum(int(0.99 * room) for room in rooms)), importance, rooms


def test_excess_equals_the_loop_of_release_1_0():
    """1.0 rounds up first and down last, so it may be off by one weight for each layer."""
    for lacking, importance, rooms in cases():
        ours = redistribute(lacking, layers_of(importance, rooms))
        exact = reference.redistribute(lacking, importance, [int(0.99 * room) for room in rooms])
        assert sum(ours) == sum(exact) == lacking
        assert all(count <= room for count, room in zip(ours, rooms, strict=True))
        assert max(abs(count - other) for count, other in zip(ours, exact, strict=True)) <= 1  # ties of remainders
        if lacking < 0.98 * sum(rooms) - 2 * len(rooms):
            release = loop_of_release_1_0(lacking, importance, rooms)
            assert all(abs(c - r) <= len(rooms) for c, r in zip(ours, release, strict=True)), (
                lacking,
                importance,
                rooms,
            )
