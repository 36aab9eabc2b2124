"""Growth without anything of a layer's dense size chooses what growth from the whole gradient would choose."""

import random
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
import torch
from helpers_growing import indices_of

from sparselearning.compact import positions
from sparselearning.selection import add_highest
from sparselearning.sparse.growing import (
    best_of,
    highest_inactive,
    inactive_of,
    random_inactive,
    random_subset,
)
from sparselearning.sparse.guided import draw, draw_connections, filled_up, guided_candidates

nan, inf = float("nan"), float("inf")


def layer(draw, most=12):
    """Return a mask of random shape and density, and a gradient of the products of whole numbers: exact, with ties."""
    rows, width, batch = draw.randint(0, most), draw.randint(1, most), draw.randint(1, 4)
    x, dy = torch.randint(-3, 4, (batch, width)), torch.randint(-3, 4, (batch, rows))
    mask = torch.rand(rows, width) < draw.choice([0.0, 0.05, 0.3, 0.9, 1.0])
    return mask, x.to(draw.choice([torch.float32, torch.float64])), dy


def chi_square(counts, draws):
    """Return how far counts are from equal ones."""
    expected = draws / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.long
def test_the_highest_are_those_of_the_whole_gradient():
    for seed in range(1000):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        mask, x, dy = layer(draw)
        dy = dy.to(x.dtype)
        whole, seen = dy.t() @ x, []

        def gradient_rows(first, last, dy=dy, x=x, seen=seen):
            seen.append((first, last))
            return dy[:, first:last].t() @ x

        k, block_bytes = draw.randint(0, mask.numel() + 2), draw.randint(1, 8 * mask.numel() + 8)
        found, gradient = highest_inactive(gradient_rows, *indices_of(mask), mask.shape[1], k, block_bytes)
        expected = (add_highest(whole.abs(), mask, k) & ~mask).flatten().nonzero().flatten()
        assert torch.equal(found, expected), f"seed {seed}"
        assert torch.equal(gradient, whole.flatten()[found].to(gradient.dtype)), f"seed {seed}"
        assert [row for first, last in seen for row in range(first, last)] == (list(range(len(mask))) if k else [])
        largest = max((last - first for first, last in seen), default=1)
        assert largest == 1 or largest * mask.shape[1] * x.element_size() <= block_bytes


@pytest.mark.parametrize("values", [[0.0, 1.0, nan], [nan], [inf, -inf, nan, 0.0], [2.0, -2.0], [0.0, -0.0]])
def test_the_highest_of_odd_values_are_those_of_the_whole_gradient(values):
    draw = random.Random(0)
    for seed in range(100):
        torch.manual_seed(seed)
        whole = torch.tensor(values)[torch.randint(len(values), (6, 7))]
        mask = torch.rand(6, 7) < 0.3
        k = draw.randint(1, 42)
        found, _ = highest_inactive(lambda i, j, g=whole: g[i:j], *indices_of(mask), 7, k, draw.choice([1, 100, 9999]))
        expected = (add_highest(whole.abs(), mask, k) & ~mask).flatten().nonzero().flatten()
        assert torch.equal(found, expected), f"seed {seed}"


@pytest.mark.parametrize("order", ["random", "rising", "falling", "ties", "columns first", "sampled"])
@pytest.mark.parametrize("k", [1, 700, 50_000, 1_000_000])
def test_the_highest_of_many_parts_are_those_of_the_whole_gradient(order, k):
    whole = torch.randn(1000, 1000)
    if order in ("rising", "falling"):
        whole = whole.flatten().sort(descending=order == "falling").values.view(1000, 1000)
    elif order == "ties":
        whole = (whole * 4).round()
    elif order == "columns first":
        whole = whole.t()
    elif order == "sampled":  # a sample of the first block, of 375 rows, finds nothing else
        whole.view(-1)[::23] += 100
    whole[500, ::3] = nan
    mask = torch.rand(1000, 1000) < 0.05
    found, gradient = highest_inactive(lambda i, j: whole[i:j], *indices_of(mask), 1000, k, 3_000_000)
    expected = (add_highest(whole.abs(), mask, k) & ~mask).flatten().nonzero().flatten()
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, whole.flatten()[found], rtol=0, atol=0, equal_nan=True)


def test_layers_without_entries_grow_nothing():
    for rows, width in ((0, 0), (0, 5), (4, 0)):
        start, column = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
        found, gradient = highest_inactive(lambda i, j, n=width: torch.empty(j - i, n), start, column, width, 3)
        assert (found.dtype, len(found), len(gradient)) == (torch.int64, 0, 0)
        assert len(random_inactive(start, column, width, 3)) == 0
        assert len(guided_candidates(torch.ones(width), torch.ones(rows), start, column, width, 3)) == 0


def test_the_best_are_the_first_of_equals_and_nan_comes_last():
    position, gradient = torch.tensor([2, 3, 5, 7, 11]), torch.tensor([nan, 1.0, -1.0, 1.0, 0.0])
    expected = [[], [3], [3, 5], [3, 5, 7], [3, 5, 7, 11], [2, 3, 5, 7, 11], [2, 3, 5, 7, 11]]
    assert [best_of(position, gradient, k)[0].tolist() for k in range(7)] == expected
    assert best_of(position, gradient, 2)[1].tolist() == [1.0, -1.0]


def test_positions_are_indices_and_back():
    for seed in range(50):
        torch.manual_seed(seed)
        mask = torch.rand(5, 6) < 0.3
        start, column = indices_of(mask)
        assert start.dtype == column.dtype == torch.int32
        assert torch.equal(positions(start, column, 6), mask.flatten().nonzero().flatten())
        asked = torch.randint(30, (40,))
        assert torch.equal(inactive_of(asked, start, column, 6), asked[~mask.flatten()[asked]])


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("active", [[0, 1, 5], [], [3, 4], list(range(2, 14))])
def test_every_set_of_inactive_entries_has_the_same_chance(active, k):
    torch.manual_seed(k)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask.view(-1)[active] = True
    sets = list(combinations([i for i in range(14) if i not in active], min(k, 14 - len(active))))
    indices, draws = indices_of(mask), max(20 * len(sets), 200)
    counts = Counter(tuple(random_inactive(*indices, 7, k).tolist()) for _ in range(draws))
    assert counts.keys() <= set(sets)
    freedom = len(sets) - 1
    assert chi_square([counts[chosen] for chosen in sets], draws) <= freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("k", [0, 3, 200, 900, 999, 1000, 5000])
def test_random_entries_are_inactive_ascending_and_as_many_as_asked_for(k):
    mask = torch.rand(50, 40) < 0.5
    found = random_inactive(*indices_of(mask), 40, k)
    assert len(found) == min(k, int((~mask).sum()))
    assert (found.diff() > 0).all()
    assert not mask.flatten()[found].any()


def test_random_entries_are_those_of_the_generator():
    start, column = indices_of(torch.rand(50, 40) < 0.5)
    before = torch.get_rng_state()
    first, second, third = (
        random_inactive(start, column, 40, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_beyond_32_bits_are_drawn_evenly():
    found = random_subset(10**12, 40_000, torch.device("cpu"))
    assert len(found) == 40_000
    counts = torch.histc(found.double(), 10, 0, 10**12)
    assert chi_square(counts.tolist(), 40_000) < 40
    assert (found % 2).sum() == pytest.approx(20_000, abs=500)


def test_indices_are_drawn_in_proportion_to_norms():
    torch.manual_seed(0)
    norm = torch.tensor([0.0, 1.0, 3.0, nan, 0.0, 6.0, inf, -2.0, 0.0])
    counts = draw(norm, 100_000).bincount(minlength=9).tolist()
    assert [count for i, count in enumerate(counts) if i not in (1, 2, 5)] == [0] * 6
    assert [counts[i] for i in (1, 2, 5)] == pytest.approx([10_000, 30_000, 60_000], abs=800)
    assert chi_square(draw(torch.zeros(4), 10_000).bincount(minlength=4).tolist(), 10_000) < 30


def test_connections_are_drawn_in_proportion_to_their_bound():
    torch.manual_seed(0)
    x_norm, dy_norm = torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([3.0, 1.0, 0.5])
    expected = (dy_norm.unsqueeze(1) * x_norm).flatten() / (dy_norm.sum() * x_norm.sum())
    counts = draw_connections(x_norm, dy_norm, 200_000).bincount(minlength=12)
    torch.testing.assert_close(counts / 200_000, expected, rtol=0, atol=0.006)


def test_candidates_are_inactive_and_once_each():
    for seed in range(50):
        torch.manual_seed(seed)
        mask = torch.rand(9, 11) < 0.4
        start, column = indices_of(mask)
        found = guided_candidates(torch.rand(11), torch.rand(9), start, column, 11, 60)
        assert 0 < len(found) <= 60
        assert (found.diff() > 0).all()
        assert not mask.flatten()[found].any()


def test_too_few_candidates_are_filled_up_at_random():
    mask = torch.rand(9, 11) < 0.4
    start, column = indices_of(mask)
    position = (~mask).flatten().nonzero().flatten()[[1, 4, 8]]
    gradient = torch.tensor([1.0, -2.0, 3.0])
    free = int((~mask).sum())
    for k in (0, 3, 4, 20, free, free + 5):
        found, values = filled_up(position, gradient, start, column, 11, k)
        assert len(found) == min(max(k, 3), free)
        assert (found.diff() > 0).all()
        assert not mask.flatten()[found].any()
        assert torch.equal(values[torch.searchsorted(found, position)], gradient)
        assert int(values.count_nonzero()) == 3


MEMORY = """
import resource, torch
from sparselearning.sparse.growing import highest_inactive, indices_at, random_inactive, random_subset
from sparselearning.sparse.guided import filled_up, guided_candidates

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

x, dy = torch.rand(8000), torch.rand(8000)
start, column = indices_at(random_subset(8000 * 8000, 10_000, torch.device("cpu")), 8000, 8000)
before = peak()
highest_inactive(lambda i, j: torch.outer(dy[i:j], x), start, column, 8000, 1000, block_bytes=1 << 20)
print(peak() - before)

n = 10**6
start, column = indices_at(random_subset(n * n, n, torch.device("cpu")), n, n)
before = peak()
found = random_inactive(start, column, n, n)
assert len(found) == n
found = guided_candidates(torch.rand(n), torch.rand(n), start, column, n, n)
assert len(found) > 0.99 * n
assert len(filled_up(found, torch.ones(len(found)), start, column, n, n)[0]) == n
print(peak() - before)
"""


@pytest.mark.long
def test_nothing_of_the_dense_size_is_made():
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, timeout=120, capture_output=True, text=True)
    of_highest, of_drawing = map(float, done.stdout.split())  # MB
    assert of_highest < 40, "beside 256 MB for the whole gradient"
    assert of_drawing < 250, "beside 8 MB for the positions of a million nonzeros"
