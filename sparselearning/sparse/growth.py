"""Growth of layers that hold active weights alone: which places come, without a tensor as large as the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparselearning import grow
from sparselearning.compact import rows_of
from sparselearning.sparse import growing
from sparselearning.sparse.guided import filled_up, guided_candidates
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.merging import kept_rows
from sparselearning.sparse.observed import Seen
from sparselearning.weights.optimizer import momentum_of

DRAWN_WHOLE = 2**26  # weights
Form = Callable[[torch.optim.Optimizer, CompactLayer, int], Tensor]


def by_gradient(optimizer: torch.optim.Optimizer, layer: CompactLayer, number: int) -> Tensor:
    """Return the places of the largest |gradient| of the last observed step, as grow.gradient_growth chooses them."""
    return growing.highest_inactive(last_seen(layer).rows, *remaining(layer), number)[0]


def by_momentum(optimizer: torch.optim.Optimizer, layer: CompactLayer, number: int) -> Tensor:
    """Return the places of the highest scores among what pruning took and the candidates, as grow.momentum_growth does.

    The score is the |momentum| of the former and the mean |gradient| of the latter. Random weights make up for what
    they lack.
    """
    candidates, module = layer.module.observed.candidates, layer.module
    position, score = module.entries.position[:0], module.value.detach()[:0]
    if layer.kept is not None:
        position, score = module.entries.position[~layer.kept], momentum_of(optimizer, module.value)[~layer.kept]
    if candidates is not None:
        position, order = torch.cat([position, candidates.position()]).sort()
        score = torch.cat([score, candidates.mean()])[order]
    chosen = growing.best_of(position, score, number)[0]
    if len(chosen) < number:
        taken = torch.cat([layer.places(), chosen]).sort().values
        rest = growing.random_inactive(*rows_of(taken, layer.shape), layer.entries.width, number - len(chosen))
        chosen = torch.cat([chosen, rest]).sort().values
    return chosen


def at_random(optimizer: torch.optim.Optimizer, layer: CompactLayer, number: int) -> Tensor:
    """Return the places of random inactive weights.

    A layer of up to `DRAWN_WHOLE` weights draws a number for each of them, block by block, so that it grows what a
    masked one grows from the same random state; a larger one draws places.
    """
    if layer.size > DRAWN_WHOLE:
        return growing.random_inactive(*remaining(layer), number)
    width = layer.entries.width
    return growing.highest_inactive(lambda first, last: torch.rand(last - first, width), *remaining(layer), number)[0]


def guided(optimizer: torch.optim.Optimizer, layer: CompactLayer, number: int) -> Tensor:
    """Return the places of the largest |gradient| among candidates that are drawn where it can be large (guided.py).

    As many are drawn as weights are to be active. What they lack comes at random.
    """
    seen = last_seen(layer)
    here = remaining(layer)
    drawn = guided_candidates(*seen.norms(), *here, number + len(here[1]))
    start, column = rows_of(drawn, layer.shape)
    position, gradient = growing.best_of(drawn, seen.at(start, column), number)
    return filled_up(position, gradient, *here, number)[0]


def last_seen(layer: CompactLayer) -> Seen:
    """Return the gradient of the last step.

    Raises:
        RuntimeError: if none was observed since the last update.
    """
    seen = layer.module.observed.last
    if seen is None:
        raise RuntimeError("No gradient was observed since the last update of the masks. Train a step in between.")
    return seen


def remaining(layer: CompactLayer) -> tuple[Tensor, Tensor, int]:
    """Return start, column and width of what pruning left."""
    entries = layer.entries
    return *kept_rows(entries.start, entries.column, layer.kept), entries.width


@cache
def growing_forms() -> dict[Callable[..., Any], Form]:
    """Return growth function -> its form without dense tensors."""
    return {
        grow.gradient_growth: by_gradient,
        grow.momentum_growth: by_momentum,
        grow.random_growth: at_random,
        grow.guided_growth: guided,
        grow.rewiring_growth: at_random,
    }
