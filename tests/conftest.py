"""One seed and one thread for every test: results repeat, and tiny tensors are faster without threads."""

import hypothesis
import pytest
import torch
from jpegs import write_folder

from sparselearning.experiments.data import files

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """Let every download fail at once."""

    def fail(folder):
        raise OSError("no network")

    monkeypatch.setattr(files, "_fetch_mnist", fail)
    monkeypatch.setattr(files, "_fetch_cifar", fail)


@pytest.fixture(scope="session")
def photograph_folder(tmp_path_factory):
    """Return a folder of photographs of four classes, train/ and val/, which tests only read."""
    return write_folder(tmp_path_factory.mktemp("photographs"))


def pytest_collection_modifyitems(config, items):
    """Run what takes longer only where `-m` says what to run, such as `-m long`, `-m "not slow"`."""
    if config.getoption("-m"):
        return
    for item in items:
        if marker := item.get_closest_marker("slow") or item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason=f"takes longer; run with -m {marker.name}"))
