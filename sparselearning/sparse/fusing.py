"""Steps of a program that one kernel makes at once: a sparse convolution, the sum with another tensor, and a ReLU.

A residual network adds the input of a block to its last convolution, and takes the ReLU of the sum. As steps of their
own, both read and write all activations again: a fifth of the time of a converted ResNet-50 for one image.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

CONVOLUTIONS = ("sparselearning.conv2d.default", "sparselearning.conv2d_plain.default")
ADDED = "conv2d_added"  # of ops.py: its arguments are those of the convolution, and what is added
ADDITIONS, RELUS = ("aten.add.Tensor", "aten.add_.Tensor"), ("aten.relu.default",)
Step = list[Any]  # operator, arguments, [name, argument] pairs


def steps_in(given: Any) -> list[int]:
    """Return the steps whose results arguments refer to."""
    if isinstance(given, dict):
        return [given["step"]] if given.keys() == {"step"} else []
    return [index for part in given for index in steps_in(part)] if isinstance(given, list) else []


def fused(steps: list[Step], results: Any) -> list[Step | None]:
    """Return the steps, each at its place, with None for those that another one makes too.

    What refers to such a step refers to the one that makes its result: the last of those that were put together.
    """
    made: list[Any] = list(steps)
    readers = Counter(index for step in [*steps, results] for index in steps_in(step))
    latest: dict[int, int] = {}  # convolution without a ReLU, or its sum -> its place

    def convolution(given: Any) -> int | None:
        index = given["step"] if isinstance(given, dict) and given.keys() == {"step"} else None
        return index if index in latest and readers[index] == 1 else None

    for place, (name, args, named) in enumerate(steps):
        if name in CONVOLUTIONS and not named and args[-1] is False:
            latest[place] = place
        elif name in RELUS and not named and (index := convolution(args[0])) is not None:
            made[place], made[index] = with_relu(made[index]), None
        elif name in ADDITIONS and not named and len(args) == 2:
            found = [index for index in map(convolution, args) if index is not None and made[index][0] != ADDED]
            if not found:
                continue
            index = max(found)  # of two convolutions the other one has been made by then
            (other,) = [given for given in args if given != {"step": index}] or [None]
            if other is not None and is_tensor(other):
                made[place], made[index] = [ADDED, [*made[index][1], other], []], None
                latest[place] = place
    return made


def is_tensor(given: Any) -> bool:
    return isinstance(given, dict) and bool(given.keys() & {"step", "input", "tensor"})


def with_relu(step: Any) -> Step:
    """Return a convolution, or its sum with another tensor, that ends in a ReLU."""
    name, args, named = step
    at = -2 if name == ADDED else -1
    return [name, [*args[:at], True, *args[len(args) + at + 1 :]], named]
