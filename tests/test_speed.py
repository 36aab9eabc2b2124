"""What keeps masked training fast: nothing allocated, waited for or compiled anew. Times are in benchmarks/."""

import pytest
import reference
import torch

from sparselearning import selection
from sparselearning.selection import add_highest, drop_lowest

SCORES = {
    "distinct": lambda n: torch.randn(n),
    "tied": lambda n: torch.randn(n).round(),
    "equal": lambda n: torch.zeros(n),
    "sorted": lambda n: torch.arange(n).float(),
    "periodic": lambda n: torch.arange(n).remainder(16).float(),  # every 16th entry is the lowest
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_a_sample_that_bounds_the_search_changes_nothing(monkeypatch, kind, density):
    monkeypatch.setattr(selection, "SAMPLE", 64)
    monkeypatch.setattr(selection, "CHUNK", 100)
    score, mask = SCORES[kind](2048), torch.rand(2048) < density
    for k in (1, 30, 100, 1000):
        dropped, added = drop_lowest(score, mask, k).tolist(), add_highest(score, mask, k).tolist()
        assert dropped == reference.drop_lowest(score.tolist(), mask.tolist(), k)
        assert added == reference.add_highest(score.tolist(), mask.tolist(), k)
