import pytest
import torch
from helpers_conversion import turns_by

from sparselearning.sparse import in_place
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.modules import SparseModule


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def force_instruction_set(monkeypatch):
    def force(index):
        monkeypatch.setattr(kernels(), "instruction_set", index)

    return force


@pytest.fixture
def timed(monkeypatch):
    """Return a function that lets layers take what a cost says, whatever the machine is busy with."""
    return lambda *costs: monkeypatch.setattr(in_place, "time_in_turns", turns_by(*costs))


@pytest.fixture
def always_faster(timed):
    """Pretend that every sparse layer is faster."""
    timed(lambda modules, place: 1.0 if isinstance(modules[place], SparseModule) else 2.0)
