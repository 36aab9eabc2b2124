"""mnist_cifar/main.py as tests run it: in this process, or in one of its own as a user does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "mnist_cifar"


def load_main():
    """Return main.py as a module."""
    spec = importlib.util.spec_from_file_location("mnist_cifar_main", FOLDER / "main.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))  # where Python looks for extensions.py when it runs the script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def type_command(*argv, cwd, **environment):
    """Run main.py in a process of its own; return it when it has ended."""
    command = [sys.executable, str(FOLDER / "main.py"), "--max-threads", "1", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def run_folder(place):
    """Return the only run folder in `place`."""
    (folder,) = Path(place).iterdir()
    return folder


def metrics_of(folder):
    """Return the records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(metrics):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in metrics]


def checkpoint_of(folder):
    """Return what the checkpoint of a run holds."""
    return torch.load(folder / "checkpoint.pt")


def assert_equal(one, other, path="", ignored=()):
    """Two states are the same to the bit, but for dict entries whose name is `ignored`."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, path
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - set(ignored):
            assert_equal(one[key], other[key], f"{path}/{key}", ignored)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{path}/{i}", ignored)
    else:
        assert one == other, path
