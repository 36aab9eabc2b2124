"""Which module's output goes where, seen by running the model once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


class Dataflow(TorchFunctionMode):
    """One run of a model: the calls of its innermost modules, and who reads each tensor.

    A tensor is known by identity and version, so that what an in-place operation leaves is another tensor.
    """

    def __init__(self, model: nn.Module, example_input: Any):
        super().__init__()
        self.stack: list[nn.Module] = []
        self.calls: dict[nn.Module, int] = defaultdict(int)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, tuple[int, int]] = {}
        self.readers: dict[tuple[int, int], set[nn.Module | None]] = defaultdict(set)
        self.alive: list[Any] = []  # a freed tensor's id would be given to another
        hooks = [hook for module in model.modules() for hook in self.watch(module)]
        try:
            with torch.no_grad(), self:
                self.result = model(*example_input) if isinstance(example_input, tuple) else model(example_input)
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in tree_leaves(self.result):
            if isinstance(tensor, Tensor):
                self.readers[key(tensor)].add(None)
        del self.alive

    def watch(self, module: nn.Module):
        def enter(module, inputs):
            self.stack.append(module)
            self.calls[module] += 1
            if inputs and isinstance(inputs[0], Tensor):
                self.inputs[module] = torch.empty_like(inputs[0], device="meta")

        def leave(module, inputs, output):
            self.stack.pop()
            if isinstance(output, Tensor):
                self.outputs[module] = key(output)

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        keys = [key(tensor) for tensor in read]
        output = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            self.alive.append((read, output))
            for tensor in keys:
                self.readers[tensor].add(self.stack[-1] if self.stack else None)
        return output

    def only_reader(self, module: nn.Module) -> nn.Module | None:
        """Return the module that alone reads what `module` gives, both being called once; else None."""
        if self.calls[module] != 1 or module not in self.outputs:
            return None
        readers = self.readers[self.outputs[module]]
        reader = next(iter(readers)) if len(readers) == 1 else None
        return reader if reader is not None and self.calls[reader] == 1 else None


def key(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), tensor._version
