"""Every method is what its paper says: its oracle, written from the paper, trains the same network bit for bit."""

from functools import partial
from types import SimpleNamespace

import pytest
from papers import LAYERS, oracle_of, score, train_adam, train_both, train_kept, train_soft

from sparselearning.methods import METHODS

SEEDS = range(24)
# How a method is compared with its oracle.
TRAININGS = dict.fromkeys(METHODS, train_both)
TRAININGS |= dict.fromkeys(["top_kast", "soft_threshold"], train_kept)
TRAININGS |= dict.fromkeys(["snip", "grasp", "synflow"], score)
TRAININGS["cht_soft"] = train_soft
TRAININGS["smet"] = train_adam
TRAININGS["srigl"] = partial(train_both, freezes=False, ties=False, layers=LAYERS[:1])  # equals are theirs to choose


def test_every_method_has_its_oracle():
    """A method that is new in the table brings tests/oracles/<its name>.py."""
    for method in METHODS:
        oracle = oracle_of(method)
        assert all(hasattr(oracle, part) for part in ("start", "moves")), method
        assert "http" in (oracle.__doc__ or ""), f"the oracle of {method} names no source"


@pytest.mark.long
def test_rigl_with_its_uniform_distribution_is_that_of_the_paper():
    """The first layer is dense, and the others have the density."""
    rigl, uniform = oracle_of("rigl"), oracle_of("sparse_momentum")
    for seed in SEEDS:
        oracle = SimpleNamespace(start=uniform.start, moves=rigl.moves, update=rigl.update)
        train_both("rigl", seed, oracle, uniform=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:A density of")
@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_that_of_the_paper(method):
    for seed in SEEDS:
        TRAININGS[method](method, seed, oracle_of(method))
