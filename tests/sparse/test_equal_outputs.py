"""When outputs count as equal, which other inputs are tried, and how the changes that do not work are found."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselearning.sparse.trees import arguments_of, leaves, of_batch, redrawn
from sparselearning.sparse.verification import difference, keep_what_works

NAN, INF = math.nan, math.inf


def compared(one, other):
    return difference(list(leaves(one)), list(leaves(other)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0, 1000.0]), torch.tensor([1.001, 1000.0])),  # rounding of the larger one
        (torch.tensor([NAN, INF, 1.0]), torch.tensor([NAN, INF, 1.0])),
        (torch.zeros(3), torch.full((3,), 1e-7)),
        ({"a": [1.0, 2]}, {"a": [1.0 + 1e-7, 2]}),
        (np.array([1.0, 2.0]), np.array([1.0 + 1e-9, 2.0])),
        (torch.arange(5000), torch.arange(5000).index_fill(0, torch.tensor([7]), 0)),  # one tie
        (SimpleNamespace(a="text", b=None), SimpleNamespace(a="text", b=None)),
    ],
)
def test_rounding_is_no_difference(one, other):
    assert not compared(one, other)


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), r"differs by 0\.01"),
        (torch.tensor([1.0, 1e9]), torch.tensor([1.1, 1e9]), r"differs by 0\.1"),  # 1e9 as masks have it
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), "infinite or not a number"),
        (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), "infinite or not a number"),
        (torch.tensor([INF, 1.0]), torch.tensor([NAN, 1.0]), "infinite or not a number"),
        (torch.zeros(2), torch.zeros(3), "shape"),
        (torch.zeros(2), torch.zeros(2).double(), "float64"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), "not contiguous"),
        (torch.arange(4), torch.arange(1, 5), "4 of 4"),
        ((1.0, 2.0), [1.0], "structure"),
        ({"a": 1.0}, {"b": 1.0}, "structure"),
        (SimpleNamespace(a=torch.zeros(1)), SimpleNamespace(a=torch.ones(1)), r"output\.a"),
        ("text", "other", "differs"),
        ([1.0, 2.0], [1.0, 2.1], r"output\[1\] differs by 0\.1"),
        (np.array([1.0]), np.array([2.0]), "differs by 1"),
        (object(), object(), "cannot be compared"),
    ],
)
def test_differences_are_named(one, other, why):
    assert re.search(why, compared(one, other))


def test_a_second_input_keeps_to_the_range_of_the_first():
    mask = torch.tensor([[0.0, -INF], [0.0, 0.0]])
    ids, images = torch.randint(5, 9, (50,)), torch.rand(4, 3, 8, 8)
    both = ((ids, {"images": images, "again": images, "mask": mask, "scale": torch.tensor(2.0), "flags": ids > 6}), {})
    args, _ = redrawn(both, True)
    assert not args[0].equal(ids)
    assert set(args[0].tolist()) <= set(range(5, 9))
    assert not args[1]["images"].equal(images)
    assert args[1]["images"] is args[1]["again"]
    assert images.min() <= args[1]["images"].min() <= args[1]["images"].max() <= images.max()
    assert all(args[1][name].equal(both[0][1][name]) for name in ("mask", "scale", "flags"))
    args, _ = redrawn(both, False)
    assert args[0].equal(ids)
    assert redrawn(((ids,), {}), False) is None
    args, _ = redrawn(((torch.zeros(9),), {}), True)
    assert args[0].std() > 0.1


def test_a_batch_repeats_the_images():
    images = torch.randn(3, 2, 4, 4)
    args, _ = of_batch(((images, torch.arange(3), torch.eye(5)), {}), 16, 1000)
    assert args[0][15].equal(images[0])
    assert args[1].tolist() == [0, 1, 2] * 5 + [0]
    assert args[2].shape == (5, 5)
    assert of_batch(((images,), {}), 16, 100) is None
    assert of_batch(((torch.randn(3, 4),), {}), 16, 1000) is None


def test_examples_are_tensors_tuples_or_dicts():
    x = torch.zeros(2)
    assert arguments_of(x) == ((x,), {})
    assert arguments_of((x, 1)) == ((x, 1), {})
    assert arguments_of({"a": x}) == ((), {"a": x})
    packed = torch.nn.utils.rnn.pack_sequence([x])
    assert arguments_of(packed) == ((packed,), {})


@given(st.integers(0, 40), st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)))
def test_exactly_the_guilty_items_are_left_out(count, guilty, curable):
    """A curable item has an alternative, its negative, that works."""

    def differs(items):
        return "wrong" if guilty & set(items) else ""

    found = keep_what_works(list(range(count)), differs, lambda item: [-1 - item] if item in curable else [])
    assert found is not None
    accepted, rejected = found
    bad = guilty & set(range(count))
    assert set(rejected) == bad
    assert set(accepted) == (set(range(count)) - bad) | {-1 - item for item in bad & curable}


def test_a_search_ends():
    assert keep_what_works(list(range(100)), lambda items: "wrong", most_runs=20) is None
    assert keep_what_works([], lambda items: "wrong") == ([], {})
