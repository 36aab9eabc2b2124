"""The masks that training starts with."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparselearning.distributions import DISTRIBUTIONS, Distribution, active_counts, none_empty
from sparselearning.names import by_density
from sparselearning.selection import add_highest, add_highest_jointly
from sparselearning.sharded import is_sharded, shard_of, uniform_like

Density = float | Mapping[str, float]
SparseInit = str | Distribution | Mapping[str, Tensor]


def initial_masks(empty: Mapping[str, Tensor], density: Density, sparse_init: SparseInit) -> dict[str, Tensor]:
    """Return name -> mask for masks that are empty yet.

    Drawn at random where `sparse_init` is a distribution; the highest of all scores where it maps names to scores;
    given where it maps names to masks (bool).

    Raises:
        ValueError: for densities that do not fit the names (see `names.by_density`) or leave no weight, an unknown
            distribution, or scores and masks that do not fit the weights.
    """
    if isinstance(sparse_init, Mapping):
        _check_fit(empty, sparse_init)
        if all(tensor.dtype == torch.bool for tensor in sparse_init.values()):
            return {name: _like(sparse_init[name], mask) for name, mask in empty.items()}
    elif not callable(sparse_init) and sparse_init not in DISTRIBUTIONS:
        names = ", ".join(map(repr, (*DISTRIBUTIONS, "resume")))
        raise ValueError(
            f"Unknown sparse_init {sparse_init!r}. Pass a function, or one of {names}, or a dict from names to scores "
            "or masks."
        )
    masks = {}
    for part, names in by_density(list(empty), density):
        group = [empty[name] for name in names]
        size = sum(mask.numel() for mask in group)
        if not round(part * size):
            raise ValueError(f"A density of {part} leaves none of {size} weights. Pass a larger one.")
        if isinstance(sparse_init, Mapping):
            scores = [_like(sparse_init[name], mask) for name, mask in zip(names, group, strict=True)]
            chosen = highest(scores, group, round(part * size))
        else:
            distribution = DISTRIBUTIONS[sparse_init] if isinstance(sparse_init, str) else sparse_init
            counts = active_counts([mask.shape for mask in group], part, distribution)
            chosen = [add_highest(uniform_like(mask), mask, count) for mask, count in zip(group, counts, strict=True)]
        masks |= zip(names, chosen, strict=True)
    return masks


def highest(scores: Sequence[Tensor], empty: Sequence[Tensor], total: int) -> list[Tensor]:
    """Return masks of the `total` highest scores of all layers together.

    No layer is left empty while another has two weights or more: it gets its highest one in place of the lowest one
    of the layer with most.
    """
    masks = add_highest_jointly(scores, empty, total)
    counts = [int(mask.sum()) for mask in masks]
    filled = none_empty(counts, [mask.numel() for mask in masks])
    if filled == counts:
        return masks
    return [add_highest(score, mask, count) for score, mask, count in zip(scores, empty, filled, strict=True)]


def _like(tensor, mask):
    if is_sharded(mask):
        return tensor if is_sharded(tensor) else shard_of(tensor, mask)
    return tensor.to(mask.device)


def _check_fit(empty, given):
    """Raise unless there is a score for every weight, or a mask for every weight and for no other."""
    kinds = {tensor.dtype == torch.bool for tensor in given.values()}
    if len(kinds) > 1:
        raise ValueError("Expected sparse_init to map names to scores, or names to masks (bool); got both kinds.")
    names = empty.keys() | given.keys() if kinds == {True} else empty.keys()
    differences = [
        f"{name} is {_shape(given, name)} in sparse_init and {_shape(empty, name)} here"
        for name in sorted(names)
        if _shape(given, name) != _shape(empty, name)
    ]
    if differences:
        kind = "masks" if kinds == {True} else "scores"
        raise ValueError(f"The {kind} do not fit: {'; '.join(differences)}. Dense weights are named in dense=[...].")


def _shape(tensors, name):
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"
