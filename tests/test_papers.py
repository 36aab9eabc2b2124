"""Every method is what its paper says: its oracle, written from the paper, trains the same network bit for bit."""

import pytest
from papers import oracle_of, train_both

from sparselearning.methods import METHODS

SEEDS = range(24)
# What an optimizer steps is what the network sees, and a random choice is only one of positions.
STEPPED = "sparse_momentum set dsr rigl deep_rewiring mest granet cht gmp one_shot static".split()


def test_every_method_has_its_oracle():
    for method in METHODS:
        oracle = oracle_of(method)
        assert all(hasattr(oracle, part) for part in ("start", "moves", "update")), method
        assert "http" in (oracle.__doc__ or ""), f"the oracle of {method} names no source"


@pytest.mark.filterwarnings("ignore:A density of")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", STEPPED)
def test_a_training_is_that_of_the_paper(method, seed):
    for _ in train_both(method, seed, oracle_of(method)):
        pass
