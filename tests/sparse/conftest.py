import pytest
import torch

from sparselearning.sparse.library import kernels


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


def pytest_collection_modifyitems(config, items):
    """Run what takes minutes only when asked for by `-m slow`."""
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))
