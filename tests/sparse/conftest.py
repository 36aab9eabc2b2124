import pytest
import torch

from sparselearning.sparse import conversion
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


@pytest.fixture
def always_faster(monkeypatch):
    """Pretend that every sparse layer and every converted model is faster, whatever the machine is busy with."""

    def compare(choices, seconds=0.0):
        for call in choices:
            call()
        return [2.0, 1.0, *[2.0 for _ in choices[2:]]]

    monkeypatch.setattr(conversion, "compare", compare)
