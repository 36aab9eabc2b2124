"""One seed and one thread for every test: results repeat, and tiny tensors are faster without threads."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
