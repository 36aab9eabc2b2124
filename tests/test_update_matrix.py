"""Every prune x growth x redistribution x init keeps the number of active weights, and inactive weights at zero.

The functions come from their tables, so a new one is tested as soon as it is there.
"""

import itertools

import pytest
import torch
from helpers import assert_masks_hold, masked, snapshot, train
from torch import nn

from sparselearning.functions import is_marked
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.start.distributions import DISTRIBUTIONS


def without_aliases(table):
    """Return the keys of a table, and of several keys for one function the first."""
    return list({function: name for name, function in reversed(table.items())}.values())[::-1]


INITS = [*DISTRIBUTIONS, "resume"]
DENSITIES = [0.05, 0.5, 0.95]
STARTS = list(itertools.product(INITS, DENSITIES))  # each combination takes three of them
COMBINATIONS = list(
    itertools.product(*map(without_aliases, (PRUNE_FUNCTIONS, GROWTH_FUNCTIONS, REDISTRIBUTION_FUNCTIONS)))
)
# Functions that find for themselves how many weights move, perhaps none.
FREE_COUNT = {"adaptive_threshold", "sign_flip", "dense_magnitude", "global_dense_magnitude"}


def network(density):
    """Return a convolution and two linear layers; some of the weights are zero, for `resume`."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) > density] = 0
    return model


@pytest.mark.filterwarnings("ignore:.* weights are not zero")  # more or fewer than `resume` is asked for
@pytest.mark.parametrize(("prune", "growth", "redistribution"), COMBINATIONS)
def test_an_update_conserves_the_active_weights(prune, growth, redistribution):
    for init, density in STARTS[COMBINATIONS.index((prune, growth, redistribution)) % 5 :: 5]:
        model = network(density)
        masking = masked(
            model,
            density=density,
            sparse_init=init,
            prune_mode=prune,
            growth_mode=growth,
            redistribution_mode=redistribution,
            weights="kept" if "dense_magnitude" in prune + growth else "zero",
        )
        masking.prune_threshold = 0.5  # among these weights: a threshold that adapts would take long to come here
        total, first = masking.total_nonzero, snapshot(masking)
        for _ in range(2):
            for _ in range(2):
                train(model, masking, steps=1, inputs=torch.randn(8, 2, 8))
                assert_masks_hold(masking)
            masking.at_end_of_epoch()
            assert_masks_hold(masking)
            assert masking.total_nonzero == masking.baseline_nonzero == total
            assert masking.total_removed > 0 or {prune, growth} & FREE_COUNT
        moved = any(not torch.equal(mask, first[name]) for name, mask in masking.masks.items())
        assert moved or {prune, growth} & FREE_COUNT, (
            f"{init} at density {density}: an update that moves nothing conserves the counts all too easily"
        )


LAYERWISE = [
    (prune, growth)
    for prune, growth in itertools.product(PRUNE_FUNCTIONS, GROWTH_FUNCTIONS)
    if not is_marked(GROWTH_FUNCTIONS[growth], "network_wide")
]


@pytest.mark.parametrize(("prune", "growth"), LAYERWISE)
def test_without_redistribution_every_layer_keeps_its_count(prune, growth):
    model = network(1.0)
    weights = "kept" if "dense_magnitude" in prune + growth else "zero"
    masking = masked(model, prune_mode=prune, growth_mode=growth, redistribution_mode="none", weights=weights)
    counts = masking.name2nonzeros
    for _ in range(3):
        train(model, masking, steps=1, inputs=torch.randn(8, 2, 8))
        masking.at_end_of_epoch()
        assert masking.name2nonzeros == counts
