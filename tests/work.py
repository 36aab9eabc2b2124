"""How much work a piece of code does, in counts that are the same on every machine."""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMMON = Path(__file__).parents[1] / "benchmarks" / "common.py"


def synchronisations():
    """Return the counter of waits for a device that the benchmarks use; benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_common", COMMON)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Synchronisations()


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs, and the entries of all tensors that they read or write."""

    VIEWS = ("detach", "view", "t", "transpose", "alias", "expand", "unsqueeze")

    def __init__(self):
        super().__init__()
        self.count, self.entries = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.VIEWS:
            self.count += 1
            self.entries += sum(
                part.numel() for part in tree_leaves((args, kwargs, result)) if isinstance(part, Tensor)
            )
        return result


def work_of(function):
    """Call `function` twice; return how many operations, entries, waits for a device and Python calls it makes."""
    with synchronisations() as waits, Operations() as operations:
        function()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return torch.tensor([operations.count, operations.entries, waits.count, calls])
