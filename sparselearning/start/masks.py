"""The masks at the start of training."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparselearning.orientation import PLAIN, Orientation
from sparselearning.patterns import UNSTRUCTURED, Pattern, of_fan_in, pattern_of, with_pattern, without_pattern
from sparselearning.processes.sharded import count_active, fetch, placed_like, uniform_like
from sparselearning.selection import add_highest, add_highest_jointly, apportion
from sparselearning.slices import are_empty, largest_of_each, number_of_slices
from sparselearning.start.distributions import DISTRIBUTIONS, Distribution, divide, none_empty
from sparselearning.start.names import by_density

Density = float | Mapping[str, float]
SparseInit = str | Distribution | Mapping[str, Tensor]
# The largest magnitudes of each layer: {sparse_init: distribution of the active weights among layers}
MAGNITUDE = {"magnitude": "constant", **{f"magnitude:{name}": name for name in DISTRIBUTIONS}}

# Receptive fields in each layer (receptive.py): {sparse_init: distribution of the active weights among layers}
RECEPTIVE = {"receptive_field": "constant", **{f"receptive_field:{name}": name for name in DISTRIBUTIONS}}

# One density for all layers but the first, which stays dense: {sparse_init: what it is beside dense=["first"]}
FIRST_DENSE = {"uniform": "constant", "magnitude:uniform": "magnitude"}


def first_dense(dense: Iterable[str], sparse_init: SparseInit) -> tuple[list[str], SparseInit]:
    """Return what stays dense, as patterns of names, and the `sparse_init` of the other layers.

    'uniform' is the uniform distribution of Evci et al. 2020 (RigL), https://arxiv.org/abs/1911.11134, section 3(1):
    the first layer is dense, and all others have the density.

    >>> first_dense(["fc3"], "uniform"), first_dense([], "constant")
    ((['fc3', 'first'], 'constant'), ([], 'constant'))
    """
    patterns = [dense] if isinstance(dense, str) else list(dense)
    if isinstance(sparse_init, str) and sparse_init in FIRST_DENSE:
        return [*patterns, "first"], FIRST_DENSE[sparse_init]
    return patterns, sparse_init


def initial_masks(
    empty: Mapping[str, Tensor],
    density: Density,
    sparse_init: SparseInit,
    orientations: Mapping[str, Orientation] | None = None,
    norm_dims: Mapping[str, int] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return {name: mask} for empty masks that carry the patterns of their layers.

    A distribution is given the shape (outputs, inputs, ...) of one layer; experts count as so many layers. No slice
    along the dimension that `norm_dims` gives for a name is empty.

    If `sparse_init` is a distribution, active weights are drawn at random, or are those of the largest `magnitudes`, or
    other scores, in each layer if these are given. If it maps names to scores, the highest
    scores of the network are active. If it maps names to masks (bool), it gives the masks. No layer stays empty while
    another has two weights or more. A layer with a pattern (patterns.py) gets the number of whole units nearest to its
    number of weights; its mask carries the pattern, with the fan-in if that is constant.

    Raises:
        ValueError: for densities that do not fit the names (see `names.by_density`), leave no weight or exceed what a
            pattern holds, or fewer than one for each slice, for an unknown distribution, or for scores or masks that do
            not fit the weights.
    """
    norm_dims = norm_dims or {}
    if isinstance(sparse_init, Mapping):
        check_fit(empty, sparse_init)
        if all(tensor.dtype == torch.bool for tensor in sparse_init.values()):
            given = {name: placed_like(mask, sparse_init[name]) for name, mask in empty.items()}
            return {name: _given(name, given[name], mask, norm_dims.get(name)) for name, mask in empty.items()}
    else:
        check_distribution(sparse_init)
    masks = {}
    for _, part, names in by_density(list(empty), density):
        group = [empty[name] for name in names]
        shapes, patterns = [mask.shape for mask in group], [pattern_of(mask) for mask in group]
        total = total_of(part, shapes)
        if isinstance(sparse_init, Mapping):
            scores = [placed_like(mask, sparse_init[name]) for name, mask in zip(names, group, strict=True)]
            plain = [torch.zeros_like(mask) for mask in group]
            shares = fetch([count_active(mask) for mask in add_highest_jointly(scores, plain, total)])
        else:
            shares = shares_of(sparse_init, shapes, [(orientations or {}).get(name, PLAIN) for name in names])
            scores = None if magnitudes is None else [magnitudes[name] for name in names]
        counts = _with_slices(names, counts_of(total, shares, shapes, patterns), shapes, norm_dims)
        for i, (name, mask) in enumerate(zip(names, group, strict=True)):
            pattern = of_fan_in(pattern_of(mask), mask.shape, counts[i])
            # The first update is the earliest to remove a neuron.
            at_first = with_pattern(without_pattern(mask), replace(pattern, ablation=0.0))
            score = uniform_like(mask) if scores is None else scores[i]
            masks[name] = with_pattern(_highest(score, at_first, counts[i], norm_dims.get(name)), pattern)
    return masks


def check_distribution(sparse_init: str | Distribution) -> None:
    """Check that `sparse_init` is a distribution, or the name of one.

    Raises:
        ValueError: if it is not.
    """
    if not callable(sparse_init) and sparse_init not in DISTRIBUTIONS:
        names = ", ".join(
            map(repr, (*DISTRIBUTIONS, *MAGNITUDE, *RECEPTIVE, *FIRST_DENSE, "resume", "snip", "grasp", "synflow"))
        )
        raise ValueError(
            f"Unknown sparse_init {sparse_init!r}. Pass a function, or one of {names}, or a dict from names to scores "
            "or masks."
        )


def total_of(density: float, shapes: Sequence[Sequence[int]]) -> int:
    """Return the number of active weights of layers of these shapes together.

    Raises:
        ValueError: if it is zero.
    """
    size = sum(map(math.prod, shapes))
    total = round(density * size)
    if not total:
        raise ValueError(f"A density of {density} leaves none of {size} weights. Pass a larger one.")
    return total


def shares_of(
    sparse_init: str | Distribution, shapes: Sequence[Sequence[int]], orientations: Sequence[Orientation]
) -> list[float]:
    """Return the share of each layer in the active weights, by a distribution; experts count as so many layers."""
    distribution = DISTRIBUTIONS[sparse_init] if isinstance(sparse_init, str) else sparse_init
    ways = zip(orientations, shapes, strict=True)
    return [way.copies * distribution(way.layer(shape)) for way, shape in ways]


def _highest(score, empty, count, norm_dim):
    if norm_dim is None:
        return add_highest(score, empty, count)
    return add_highest(score, largest_of_each(score, ~empty, norm_dim), count - number_of_slices(score.shape, norm_dim))


def masks_of_nonzeros(
    weights: Mapping[str, Tensor], empty: Mapping[str, Tensor], density: Density
) -> dict[str, Tensor]:
    """Return {name: mask} in which the nonzero weights are active, and zeros where the density asks for more.

    A weight that has just grown is zero until a step trains it, so that a model which was saved right after an update
    has fewer nonzero weights than active ones. The missing places are divided among layers in proportion to their
    nonzero weights and drawn at random; a layer without any gets one. Where more weights are nonzero than the density
    asks for, all stay active. Both are said in a warning with the counts. Neurons that a pattern removed stay removed.

    Raises:
        ValueError: for densities that do not fit the names (see `names.by_density`).
    """
    nonzero = {name: weight.detach() != 0 for name, weight in weights.items()}
    found = dict(zip(nonzero, map(int, fetch([count_active(mask) for mask in nonzero.values()])), strict=True))
    masks = {}
    for _, part, names in by_density(list(weights), density):
        counts, patterns = [found[name] for name in names], [pattern_of(empty[name]) for name in names]
        size = sum(empty[name].numel() for name in names)
        room = [
            0 if pattern.ablation else max(pattern.capacity(empty[name].shape) - found[name], 0)
            for pattern, name in zip(patterns, names, strict=True)
        ]
        lacking = max(round(part * size) - sum(counts), counts.count(0))
        more = apportion(min(lacking, sum(room)), counts, room)
        more = none_empty(more, [int(count == 0 < free) for count, free in zip(counts, room, strict=True)], counts)
        _tell(sum(counts), size, round(part * size), part, sum(more))
        for name, pattern, number in zip(names, patterns, more, strict=True):
            masks[name] = _filled(nonzero[name], pattern, number)
    return masks


def _filled(mask, pattern, number):
    """Return the mask with about `number` more entries, drawn at random: as many as its pattern lets it grow by."""
    if not number:
        return mask
    step, count = pattern.step(mask.shape), int(mask.sum())
    target = max(round((count + number) / step), -(-count // step)) * step
    whole = with_pattern(mask, of_fan_in(pattern, mask.shape, target))
    return without_pattern(add_highest(uniform_like(mask), whole, target - count))


def _tell(nonzero, size, asked, density, added):
    if nonzero == asked and not added:
        return
    counts = f"{nonzero} of {size} weights are not zero, and a density of {density} asks for {asked}"
    if not added:
        counts += ": all of them stay active"
    else:
        counts += (
            f": {added} zeros, drawn at random, become active too. Weights that grew right before a model was saved "
            "are still zero; where its masks were saved, start from them: sparse_init=load_masks(path), or mask:PATH"
        )
    warnings.warn(f"{counts}. The nonzero weights alone have the density {nonzero / size!r}.", stacklevel=5)


def counts_of(
    total: int, shares: Sequence[float], shapes: Sequence[Sequence[int]], patterns: Sequence[Pattern]
) -> list[int]:
    """Return the number of active weights of each layer, a multiple of its pattern's step.

    Raises:
        ValueError: if the patterns hold fewer than `total`.
    """
    capacities = [pattern.capacity(shape) for pattern, shape in zip(patterns, shapes, strict=True)]
    if total > sum(capacities):
        size = sum(map(math.prod, shapes))
        raise ValueError(
            f"Expected a density of at most {sum(capacities) / size:g}, which is all that the pattern "
            f"{patterns[0].name!r} holds, got {total / size:g}. Pass a smaller one, or a smaller start_density where "
            "the density falls."
        )
    steps = [pattern.step(shape) for pattern, shape in zip(patterns, shapes, strict=True)]
    return divide(total, shares, capacities, steps)


def _with_slices(names, counts, shapes, norm_dims):
    """Return counts of the same sum, with a weight for each slice that may not be empty."""
    dims = [norm_dims.get(name) for name in names]
    if all(dim is None for dim in dims):
        return counts
    least = [number_of_slices(shape, dim) for shape, dim in zip(shapes, dims, strict=True)]
    spare = [max(count - few, 0) for count, few in zip(counts, least, strict=True)]
    lacking = [max(few - count, 0) for count, few in zip(counts, least, strict=True)]
    if sum(lacking) > sum(spare):
        raise ValueError(
            f"Expected at least {sum(least)} active weights in {', '.join(names)}, one for each slice that weight_norm "
            f"divides by its norm, got {sum(counts)}. Pass a larger density, or name layers in dense=[...]."
        )
    given = apportion(sum(lacking), spare, spare)
    return [count + more - less for count, more, less in zip(counts, lacking, given, strict=True)]


def _given(name, mask, empty, norm_dim):
    if norm_dim is not None and are_empty(mask, norm_dim).any():
        raise ValueError(
            f"The mask of {name} leaves slices empty that weight_norm divides by their norms. Keep one each."
        )
    pattern = of_fan_in(pattern_of(empty), mask.shape, int(mask.sum()))
    if pattern != UNSTRUCTURED and not pattern.holds(mask):
        raise ValueError(f"The mask of {name} is not of the pattern {pattern.name!r}. Choose another one.")
    return with_pattern(without_pattern(mask), pattern)


def check_fit(empty: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise unless every weight has a score, or every weight and nothing else has a mask."""
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
        raise ValueError(
            f"The {kind} do not fit: {'; '.join(differences)}. Name weights that stay dense in dense=[...]."
        )


def _shape(tensors, name):
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"
