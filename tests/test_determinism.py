"""The same seed gives the same masks, on any number of threads and with torch's deterministic algorithms."""

import pytest
import torch
from helpers import masked, mlp, same, snapshot, train

from sparselearning import selection
from sparselearning.grow import GROWTH_FUNCTIONS


def masks_after_training(growth):
    torch.manual_seed(3)
    model = mlp(300, 200, 100)  # large enough for torch to use all threads
    masking = masked(model, growth_mode=growth)
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    return snapshot(masking)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("growth", [name for name in GROWTH_FUNCTIONS if "dense" not in name])  # of weights="kept"
def test_the_same_seed_gives_the_same_masks(growth):
    assert same(masks_after_training(growth), masks_after_training(growth))


def test_two_threads_give_the_masks_of_one(two_threads):
    alone = masks_after_training("momentum")
    two_threads()
    assert same(masks_after_training("momentum"), alone)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_do_all_that_masks_need():
    masks_after_training("momentum")
    scores, masks = [torch.rand(40, 30), torch.rand(500)], [torch.rand(40, 30) < 0.5, torch.rand(500) < 0.5]
    scores[0][::2] = 0.5  # ties
    for k in (1, 100, 400):
        for negate in (False, True):
            expected = selection._mark_lowest_on_cpu(scores, masks, k, negate)
            found = selection._mark_lowest_on_device(scores, masks, k, negate)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
