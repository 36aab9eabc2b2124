import pytest
import torch

from sparselearning.sparse.interface import kernels


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
