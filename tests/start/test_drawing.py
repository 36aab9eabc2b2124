"""Positions of active weights that are drawn without a mask: uniform, exact, and counted as masks are."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparselearning.orientation import Orientation
from sparselearning.patterns import UNSTRUCTURED, pattern_for
from sparselearning.start.drawing import draw_positions, initial_positions
from sparselearning.start.masks import initial_masks

SHAPES = {
    "conv.weight": torch.Size([16, 8, 3, 3]),
    "up.weight": torch.Size([8, 16, 4, 4]),
    "fc1.weight": torch.Size([30, 20]),
    "fc2.weight": torch.Size([10, 30]),
}
ORIENTATIONS = {"up.weight": Orientation(inputs_first=True)}


@given(st.integers(0, 300), st.data())
def test_as_many_as_asked_for_ascending_and_in_range(size, data):
    k = data.draw(st.integers(0, size))
    found = draw_positions(size, k)
    assert found.dtype == torch.int64
    assert found.device.type == "cpu"
    assert len(found) == k
    assert (found.diff() > 0).all()
    assert ((found >= 0) & (found < size)).all()


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_subset_is_equally_likely(k):
    torch.manual_seed(k)
    subsets = list(combinations(range(6), k))
    often = Counter(tuple(draw_positions(6, k).tolist()) for _ in range(300 * len(subsets)))
    squares = sum((often[subset] - 300) ** 2 / 300 for subset in subsets)
    assert len(often) == len(subsets)
    assert squares < len(subsets) - 1 + 4 * (2 * (len(subsets) - 1)) ** 0.5, "chi-squared, four standard deviations"


@pytest.mark.parametrize("size", [260_000_000, 3_000_000_000, 10**12])
def test_no_number_is_preferred_in_large_ranges(size):
    """2^32 numbers are no multiple of these sizes: remainders of 32 bits would fall below `least` too often."""
    torch.manual_seed(0)
    least = 2**32 % size
    found = draw_positions(size, 10**6)
    assert len(found) == 10**6
    assert (found.diff() > 0).all()
    part = least / size
    assert (found < least).double().mean().item() == pytest.approx(part, abs=5 * (part * (1 - part) / 10**6) ** 0.5)
    assert found.double().mean().item() == pytest.approx(size / 2, rel=5 * (1 / 3) ** 0.5 * 1e-3)


def test_the_seed_decides():
    torch.manual_seed(3)
    first = draw_positions(1000, 100)
    torch.manual_seed(3)
    assert torch.equal(first, draw_positions(1000, 100))
    assert not torch.equal(first, draw_positions(1000, 100))


def test_positions_are_real_under_a_default_device():
    with torch.device("meta"):
        found = draw_positions(10, 5), draw_positions(10, 8)
    assert [int(each.device.type == "cpu") for each in found] == [1, 1]


@pytest.mark.parametrize(("size", "k"), [(5, 6), (5, -1), (0, 1)])
def test_more_than_there_are_is_refused(size, k):
    with pytest.raises(ValueError, match=f"between 0 and {size} positions, got {k}"):
        draw_positions(size, k)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.7, 1.0, {"fc*": 0.5, "*": 0.05}], ids=str)
@pytest.mark.parametrize("start", ["constant", "linear", "erdos_renyi_kernel", lambda shape: shape[0]])
def test_layers_have_as_many_as_their_masks_would(start, density):
    empty = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    masks = initial_masks(empty, density, start, ORIENTATIONS)
    found = initial_positions(SHAPES, density, start, ORIENTATIONS, dict.fromkeys(SHAPES, UNSTRUCTURED))
    assert {name: len(each) for name, each in found.items()} == {name: int(x.sum()) for name, x in masks.items()}
    assert all(each.max() < SHAPES[name].numel() for name, each in found.items())


def test_masks_by_name_give_the_positions():
    masks = {name: torch.rand(shape) < 0.1 for name, shape in SHAPES.items()}
    masks["conv.weight"] = masks["conv.weight"].to(memory_format=torch.channels_last)
    for name, each in initial_positions(SHAPES, 0.5, masks).items():
        again = torch.zeros(SHAPES[name].numel(), dtype=torch.bool)
        again[each] = True
        assert torch.equal(again.view(SHAPES[name]), masks[name])


def test_masks_that_do_not_fit_are_refused():
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()} | {
        "fc1.weight": torch.ones(3, 3, dtype=torch.bool)
    }
    with pytest.raises(ValueError, match=r"fc1.weight is \(3, 3\) in sparse_init and \(30, 20\) here"):
        initial_positions(SHAPES, 0.5, masks)


@pytest.mark.parametrize("start", ["magnitude", "magnitude:linear", "magnitude:uniform", "resume", "snip", "synflow"])
def test_what_needs_values_is_refused(start):
    with pytest.raises(ValueError, match=f"hold no values.*'{start}' reads the values of weights"):
        initial_positions(SHAPES, 0.1, start)


def test_scores_patterns_and_weight_norm_are_refused_together():
    scores = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    patterns = {"fc1.weight": pattern_for("2:4", (30, 20)), "fc2.weight": UNSTRUCTURED}
    with pytest.raises(ValueError, match=r"gives scores.*patterns for fc1.weight \(2:4\); weight_norm computes fc2"):
        initial_positions(SHAPES, 0.1, scores, None, patterns, {"fc2.weight": 0})


def test_unknown_starts_and_densities_are_refused():
    with pytest.raises(ValueError, match="Unknown sparse_init 'erk'"):
        initial_positions(SHAPES, 0.1, "erk")
    with pytest.raises(ValueError, match="leaves none"):
        initial_positions(SHAPES, 1e-9, "constant")
    with pytest.raises(ValueError, match="'head' of density"):
        initial_positions(SHAPES, {"head": 0.1, "*": 0.1}, "constant")
