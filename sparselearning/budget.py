"""How many weights move in an update: what each layer gains or loses by the density, prunes, and grows.

Counts in, counts out. Where the density changes over time (`schedules.Updates.density`), n = round(density(step) *
size) weights are to be active after an update, and each layer's share of the change is

    c_i = +-apportion(|n - sum nnz|, nnz, room)

Layers of different budgets (`add_module(density={pattern: ...})`) exchange no weights: an update moves each budget as a
network of its own, and the density of the network is that of all budgets, in proportion to what they hold.

If the density falls, layer i prunes k_i = -c_i + ceil(p_i * (nnz_i + c_i)) weights. After pruning the network grows as
many weights as it lacks: what was pruned, less what the density fell by, or plus what it rose by.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from sparselearning.budgets import layers_of
from sparselearning.layer import SparseLayer
from sparselearning.selection import apportion, count_of
from sparselearning.slices import number_of_slices
from sparselearning.start.distributions import at_least_one_each, none_empty

Layers = Sequence[SparseLayer]


def unit_of(layers: Layers) -> int:
    """Return how many weights move together; 1 where this differs between layers, which then exchange none."""
    sizes = {layer.pattern.size for layer in layers}
    return sizes.pop() if len(sizes) == 1 else 1


def change_density(density: float | Mapping[str, float] | None, layers: Layers) -> None:
    """Set how many weights each budget keeps, and by how many each layer changes with it (`SparseLayer.change`).

    Args:
        density: of the network, or of the budgets by their patterns; one that has none stays as it is, None all.

    Raises:
        ValueError: for a pattern of no budget, or a density that is more than the layers' pattern can hold.
    """
    for layer in layers:
        layer.change = 0
    budgets = {layer.budget: layer.budget.pattern for layer in layers}
    if isinstance(density, Mapping):
        parts = [
            (density[pattern], layers_of(budget, layers)) for budget, pattern in budgets.items() if pattern in density
        ]
    else:
        parts = [] if density is None else [(density, layers)]
    for value, part in parts:
        for layer, change in zip(part, change_to(value, part), strict=True):
            layer.change = change
    for budget in {layer.budget: None for _, part in parts for layer in part}:
        budget.nonzeros = sum(layer.nonzeros + layer.change for layer in layers_of(budget, layers))


def change_to(density: float, layers: Layers) -> list[int]:
    """Return how many weights each layer gains (loses, if negative) until the layers have this density together.

    A layer that holds weights keeps one; if the density leaves less than one for each, all keep one, with a warning.

    Raises:
        ValueError: if the density is more than the layers' pattern can hold.
    """
    unit = unit_of(layers)
    units = round(density * sum(layer.size for layer in layers) / unit)
    active = [layer.nonzeros // unit for layer in layers]
    room = [layer.room // unit for layer in layers]
    sizes = [layer.size // unit if layer.nonzeros else 0 for layer in layers]
    units = at_least_one_each(units, sizes, [number_of_slices(layer.shape, layer.norm_dim) for layer in layers])
    rise = units - sum(active)
    if rise > sum(room):
        raise ValueError(f"The density schedule asks for a density of {density}, more than the pattern can hold.")
    if rise < 0:
        left = [count - fall for count, fall in zip(active, apportion(-rise, active, active), strict=True)]
        change = [count - had for count, had in zip(none_empty(left, active), active, strict=True)]
    else:
        change = apportion(rise, active, room)
    return [gain * unit for gain in change]


def shares(importance: Sequence[float], layers: Layers) -> list[float]:
    """Return importance as shares that sum to 1; NaN (a layer without active weights) and negative count as zero.

    Raises:
        ValueError: if an importance is infinite.
    """
    importance = [max(value, 0.0) if value == value else 0.0 for value in importance]
    total = sum(importance)
    if total == math.inf:
        name = layers[importance.index(max(importance))].name
        raise ValueError(f"{name} has importance inf; expected a finite number. Training has probably diverged.")
    return [value / total if total else 1 / len(layers) for value in importance]


def rate_at(decay: Callable[[int], float], step: int) -> float:
    """Return the prune rate at a step.

    Raises:
        ValueError: if the schedule gives a number outside [0, 1].
    """
    if not 0 <= (rate := decay(step)) <= 1:
        raise ValueError(f"Expected a prune rate in [0, 1] at step {step}, got {rate} of prune_rate_decay.")
    return rate


def prune_rates(rate: float, layers: Layers, after_pruning: bool = False) -> list[float]:
    """Return the fraction of its active weights that each layer prunes.

    A nearly dense layer that is still growing prunes at most its sparsity (Dettmers & Zettlemoyer 2019), where it is
    known before pruning which layers grow.
    """
    rates = []
    for layer in layers:
        sparsity, gain = 1 - layer.density, layer.change
        # It would only prune what it regrows.
        growing = not after_pruning and sparsity < 0.2 and layer.importance > 1 / len(layers)
        own = min(rate, sparsity) if growing else rate
        rates.append((count_of(own, layer.nonzeros + gain) - gain) / layer.nonzeros if gain < 0 else own)
    return rates


def give_back(lacking: int, layers: Layers) -> list[int]:
    """Return how many weights each layer grows if each gets back what it lost, but for the change of the density."""
    unit = unit_of(layers)
    lost = [layer.room if layer.pattern.ablation else max(layer.removed + layer.change, 0) for layer in layers]
    room = [layer.room // unit for layer in layers]
    return [count * unit for count in apportion(min(lacking // unit, sum(room)), lost, room)]


def redistribute(lacking: int, layers: Layers, in_proportion: bool = False) -> list[int]:
    """Return how many weights each layer grows: in proportion to its importance, and equal parts of the excess.

    Layer i grows min(room_i, r_i * lacking + excess), where r_i is its importance and `excess` is the same number for
    all layers: what full layers cannot take goes in equal parts to the others, as in release 1.0. A layer of importance
    zero takes its part, too. No layer is filled beyond 99% of its room, unless the weights fit nowhere else.

    `in_proportion`: the excess is divided in proportion to the importance, and layers fill up.
    """
    unit, importance = unit_of(layers), [layer.importance for layer in layers]
    room = [int(0.99 * layer.room) // unit for layer in layers]
    if in_proportion or sum(room) < lacking // unit:
        room = [layer.room // unit for layer in layers]
    units = min(lacking // unit, sum(room))
    shares = importance if in_proportion else _share_excess([units * part for part in importance], room)
    counts = apportion(units, shares, room)
    # A layer that lost its last weight would have no importance, and stay empty for ever.
    emptied = [int(layer.removed > 0 and layer.nonzeros == 0 and layer.room >= unit) for layer in layers]
    return [count * unit for count in none_empty(counts, emptied, [layer.nonzeros for layer in layers])]


def _share_excess(quotas: Sequence[float], room: Sequence[int]) -> list[float]:
    """Return min(room_i, quota_i + excess), with the `excess` >= 0 at which they sum to what the quotas sum to.

    Release 1.0 adds the mean of what does not fit to all layers, again and again; this is where its loop ends.

    >>> _share_excess([60.0, 30.0, 10.0], room=[40, 100, 100])
    [40.0, 40.0, 20.0]
    """
    unfilled, excess = list(range(len(room))), 0.0
    while any(quotas[i] + excess > room[i] for i in unfilled):
        unfilled = [i for i in unfilled if quotas[i] + excess <= room[i]]
        left = sum(quotas) - sum(room[i] for i in range(len(room)) if i not in unfilled)
        excess = (left - sum(quotas[i] for i in unfilled)) / len(unfilled) if unfilled else math.inf
    return [min(float(places), quota + excess) for quota, places in zip(quotas, room, strict=True)]
