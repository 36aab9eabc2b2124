"""Second copies of the weights, which optimizers keep: averages, slow weights, where a step began.

Whoever swaps them in makes the network dense, unless they are masked too.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselearning.weights.optimizer import state_of

# Names of copies in the states of ASGD, schedule-free optimizers, Lookahead and averages; and of what is none.
COPIES: tuple[str, ...] = ("ax", "z", "slow_buffer", "lookahead_slow_buff", "cached_params", "swa_buffer", "ema")
OTHERS: tuple[str, ...] = (
    "step",
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "grad_avg",
    "sum",
)
CLOSE = 0.1  # a tensor that differs from the weight by less than this fraction of its norm is taken for a copy


class SecondCopies:
    """The copies of weights in the states of an optimizer and its wrappers, which `chain` lists.

    A tensor of an unknown name is a copy if it lies close to the weight when it appears.
    """

    def __init__(self, chain: Sequence[Any]):
        self.chain, self.wrapped = chain, len(chain) > 1
        self.plain = not any(
            hasattr(each, part) for each in chain[:1] for part in ("members", "optim")
        )  # see `state_of`
        self.copies, self.others = set(COPIES), set(OTHERS)  # names

    def of(self, weight: Tensor, mask: Tensor, values: Tensor | None = None) -> Iterable[tuple[str, Tensor]]:
        """Return name and tensor of every copy of a weight; `values` are those to compare with, if not its own."""
        if not self.chain:
            return ()
        if not self.wrapped:
            state = self.chain[0].state.get(weight, {}) if self.plain else state_of(self.chain[0], weight)
            if state.keys() <= self.others:
                return ()
        return self.found(weight, mask, weight if values is None else values)

    def found(self, weight: Tensor, mask: Tensor, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of every copy of a weight, after all that is known not to be one."""
        for name, tensor in self.candidates(weight):
            if not isinstance(tensor, Tensor) or tensor.shape != weight.shape or not tensor.is_floating_point():
                continue
            if name not in self.copies | self.others and (close := is_close(tensor, values, mask)) is not None:
                (self.copies if close else self.others).add(name)
            if name in self.copies:
                yield name, tensor

    def candidates(self, weight: Tensor) -> Iterator[tuple[str, Any]]:
        """Yield name and value of all that is kept for a weight."""
        states = {id(state): state for state in (_state(each, weight) for each in self.chain)}
        for state in states.values():
            yield from state.items()
        for wrapper in self.chain[:-1]:
            yield from listed(wrapper, weight)


def _state(optimizer, weight):
    return state_of(optimizer, weight) if isinstance(getattr(optimizer, "state", None), dict) else {}


def is_close(tensor: Tensor, weight: Tensor, mask: Tensor) -> bool | None:
    """Tell whether a tensor is close to the weight where that is active; None where all of it is zero."""
    difference, norm = torch.stack([((tensor - weight) * mask).norm(), (weight * mask).norm()]).tolist()
    return difference < CLOSE * norm if norm else None


def listed(wrapper: Any, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of a weight in the lists of a wrapper that hold one tensor for each parameter."""
    parameters = [parameter for group in getattr(wrapper, "param_groups", ()) for parameter in group["params"]]
    place = next((i for i, parameter in enumerate(parameters) if parameter is weight), None)
    for name, value in list(getattr(wrapper, "__dict__", {}).items()):
        if place is not None and isinstance(value, list | tuple):
            tensors = list(_flat(value))
            if len(tensors) == len(parameters) and tensors[place] is not weight:
                yield f"{type(wrapper).__name__}.{name}", tensors[place]


def _flat(value):
    for part in value:
        if isinstance(part, list | tuple):
            yield from _flat(part)
        else:
            yield part
