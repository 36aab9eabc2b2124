"""Layers in a row: a convolution, a ReLU and a max-pooling are computed together, where nothing looks between them.

torch runs `nn.Sequential` a layer at a time, and each layer reads and writes all activations. Inside a row nobody else
reads what lies between two neighbours, unless a hook does.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from sparselearning.sparse.pooling import BatchLastMaxPool2d
from sparselearning.sparse.trained_conv import TrainedConv2d

HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")


class Row(nn.Sequential):
    """An nn.Sequential that computes some neighbours together."""

    plain: type[nn.Sequential] = nn.Sequential  # the class that it was

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        layers = list(self)
        while layers:
            output, count = begin(layers, input)
            input, layers = output, layers[count:]
        return input

    def __reduce_ex__(self, protocol):
        return empty_row, (self.plain,), self.__getstate__()


def begin(layers: list[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """Return the output of the first of these layers, and how many they are."""
    first = layers[0]
    if type(first) is TrainedConv2d and (pool := pooling_of(layers[1:3])) and not watched(first):
        y = first.pooled(x, pool.window())
        if y is not None:
            return y, 3
    elif (pool := pooling_of(layers[:2])) and pool.has_kernel(x) and not first.inplace:  # or x would change
        return pool.pooled(x, relu=True), 2
    return first(x), 1


def pooling_of(layers: list[nn.Module]) -> BatchLastMaxPool2d | None:
    """Return the second of these layers if they are a ReLU and a max-pooling, and nothing looks at what they do."""
    if len(layers) < 2 or type(layers[0]) is not nn.ReLU or type(layers[1]) is not BatchLastMaxPool2d:
        return None
    return None if watched(layers[0]) or watched(layers[1]) else layers[1]


def watched(module: nn.Module) -> bool:
    """Return whether a hook, or a forward of its own, sees what goes in and out of the module."""
    hooks = any(getattr(module, name) or getattr(of_all_modules, f"_global{name}") for name in HOOKS)
    return hooks or "forward" in vars(module) or module._compiled_call_impl is not None


def row_for(module: nn.Module) -> type[Row] | None:
    """Return the class that `module` becomes to compute neighbours together, if it is in a row and has some."""
    if not isinstance(module, nn.Sequential) or isinstance(module, Row):
        return None
    pools = any(type(a) is nn.ReLU and isinstance(b, nn.MaxPool2d) for a, b in pairwise(module))
    return row_of(type(module)) if pools else None


@functools.cache
def row_of(kind: type[nn.Sequential]) -> type[Row]:
    """Return the class of rows that computes neighbours together and is a `kind` else.

    Where `kind` has a forward of its own, that calls the row's as super().forward.
    """
    if kind is nn.Sequential:
        return Row
    bases = (kind, Row)
    return type(kind.__name__, bases, {"plain": kind, "__module__": kind.__module__})  # pyright: ignore[reportGeneralTypeIssues]


def empty_row(kind: type[nn.Sequential]) -> Row:
    """Return a row without layers or attributes, for a copy to fill."""
    row = row_of(kind)
    return row.__new__(row)
