"""The scripts as tests run them: in this process, or in one of their own as a user does; and what their runs leave."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from sparselearning.experiments.report import plots

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "mnist_cifar"


def load_main(folder="mnist_cifar"):
    """Return the main.py of a folder as a module."""
    place = ROOT / folder
    spec = importlib.util.spec_from_file_location(f"{folder}_main", place / "main.py")
    module = importlib.util.module_from_spec(spec)
    for neighbour in place.glob("*.py"):
        sys.modules.pop(neighbour.stem, None)  # another script's module of the same name
    sys.path.insert(0, str(place))  # where Python looks for extensions.py when it runs the script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(place))
    return module


def small_network(args, classes):
    """Return a small network in place of a ResNet, which takes a minute in fp16, compiled or in several processes."""
    layers = dict(conv1=nn.Conv2d(3, 8, 3, 2), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(), conv2=nn.Conv2d(8, 16, 3, 2))
    return nn.Sequential(
        OrderedDict(layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, classes))
    )


def draw_nothing(monkeypatch):
    """Let runs draw no pictures, which take a second."""
    monkeypatch.setattr(plots, "plot_curves", lambda *_: None)
    monkeypatch.setattr(plots, "plot_density", lambda *_: None)


def runner(main, folder, monkeypatch, caplog, *flags):
    """Return a function that makes a run in this process, in `folder` and without pictures, and returns its folder."""
    caplog.set_level("INFO")
    draw_nothing(monkeypatch)

    def run(*argv, place="runs"):
        main.main([*flags, "--run-dir", str(folder / place), *map(str, argv)])
        return run_folder(folder / place)

    return run


def type_command(*argv, cwd, **environment):
    """Run mnist_cifar/main.py in a process of its own; return it when it has ended."""
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


def without_times(metrics):
    """Return the records without what no two runs share."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in metrics]


def checkpoint_of(folder):
    """Return what the checkpoint of a run holds."""
    return torch.load(folder / "checkpoint.pt")


def assert_equal(one, other, path="", ignored=()):
    """Two states are the same to the bit, but for dict entries whose name is `ignored`."""
    assert type(one) is type(other) or (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)), path
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


def assert_same_run(folder, whole):
    """Two runs left the same metrics and the same checkpoint, but for their times and where they were kept."""
    assert_equal(checkpoint_of(folder), checkpoint_of(whole), ignored=("seconds", "images_per_second", "args"))
    assert without_times(metrics_of(folder)) == without_times(metrics_of(whole))
