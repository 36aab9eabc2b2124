"""What the optimizer keeps for a weight on another process: ZeroRedundancyOptimizer and its kind divide it by weights.

A momentum that this process does not hold is fetched for an update of the masks, and dropped after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparselearning.functions import may_read
from sparselearning.processes.group import current
from sparselearning.processes.sharded import is_sharded
from sparselearning.weights.optimizer import MOMENTA, state_of

Described = dict[str, torch.dtype] | None


def described(optimizer: torch.optim.Optimizer, weight: Tensor) -> Described:
    """Return name and dtype of the momenta that this process holds of a weight; None if it holds nothing."""
    state = state_of(optimizer, weight)
    momenta = {name: state[name] for name in MOMENTA if isinstance(state.get(name), Tensor)}
    return {name: value.dtype for name, value in momenta.items()} if state else None


@contextmanager
def all_momenta(masking: Any, found: Sequence[Sequence[Described]]) -> Iterator[None]:
    """Let every process have all momenta that functions may read; `found` is what each holds, by rank and layer.

    Raises:
        RuntimeError: if a part of a sharded weight has its state elsewhere.
    """
    functions = (masking.prune, masking.grow, masking.measure)
    if any(may_read(function, what) for function in functions for what in ("momentum", "second_moment")):
        for i, layer in enumerate(masking.layers):
            _borrow(masking, layer, [of_rank[i] for of_rank in found])
    try:
        yield
    finally:
        masking.held.borrowed.clear()


def _borrow(masking, layer, found):
    """Fetch the momenta of a layer that only some processes hold, from the first of them."""
    owner = next((place for place, each in enumerate(found) if each is not None), None)
    if owner is None or all(each is not None for each in found):
        return
    weight = masking.held.stepped_for(layer)
    if is_sharded(weight):
        raise RuntimeError(
            f"{type(masking.optimizer).__name__} keeps no state for the part of {layer.name} of some processes. Give "
            "the optimizer the sharded parameters on all, or let functions read no momentum: growth_mode='gradient' "
            "and redistribution_mode='magnitude'."
        )
    own = state_of(masking.optimizer, weight) if current().rank == owner else {}
    state = {}
    for name, dtype in found[owner].items():
        # A sum with zeros arrives as it was sent, whatever groups or meshes it goes through.
        state[name] = own[name].clone() if own else torch.zeros_like(weight, dtype=dtype)
        current().reduce(state[name])
    masking.held.borrowed[weight] = state
