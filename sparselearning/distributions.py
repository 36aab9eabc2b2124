"""Sparsity distributions: from the shape of a weight to its share of the network's active weights."""

import math
import warnings
from collections.abc import Callable, Sequence

from sparselearning.selection import apportion

Distribution = Callable[[Sequence[int]], float]


def uniform(shape: Sequence[int]) -> float:
    """Give every layer the same density."""
    return math.prod(shape)


def erdos_renyi(shape: Sequence[int]) -> float:
    """Give a layer the density (n_in + n_out) / (n_in * n_out), up to a factor common to all layers.

    Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity,
    https://arxiv.org/abs/1707.04780. Positions in a kernel do not count.
    """
    n_out, n_in, *kernel = shape
    return (n_in + n_out) * math.prod(kernel)


def erdos_renyi_kernel(shape: Sequence[int]) -> float:
    """Give a layer the density sum(shape) / prod(shape), up to a factor common to all layers.

    Evci et al. 2020, Rigging the Lottery, https://arxiv.org/abs/1911.11134 (ERK).
    """
    return sum(shape)


def active_counts(shapes: Sequence[Sequence[int]], density: float, distribution: Distribution) -> list[int]:
    """Divide round(density * number of weights) active weights among layers of the given shapes.

    The total is exact. A layer takes at most its size, what is over goes to the others. No layer is left empty, for
    nothing would ever flow through it: one that gets nothing takes a weight of the largest, and where there are fewer
    active weights than layers the total becomes one for each, with a warning.

    >>> active_counts([(10, 100), (5, 10)], density=0.1, distribution=erdos_renyi_kernel)
    [92, 13]
    """
    sizes = [math.prod(shape) for shape in shapes]
    return divide(round(density * sum(sizes)), [distribution(shape) for shape in shapes], sizes, [1] * len(sizes))


def divide(total: int, shares: Sequence[float], capacities: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Divide `total` active weights among layers that grow by steps of so many weights, and hold so many.

    Where all steps are the same the total is exact, to the step nearest to it; where they differ, each layer's count is
    the multiple of its step that is nearest to its share. No layer is left empty, as in `active_counts`.

    >>> divide(100, shares=[1, 1], capacities=[1000, 1000], steps=[8, 8]), divide(100, [1, 1], [1000, 1000], [8, 30])
    ([48, 48], [48, 60])
    """
    if len(set(steps)) == 1:
        rooms = [capacity // step for capacity, step in zip(capacities, steps, strict=True)]
        units = at_least_one_each(round(total / steps[0]), rooms)
        counts = none_empty(apportion(units, shares, rooms), rooms)
        return [count * step for count, step in zip(counts, steps, strict=True)]
    counts = apportion(total, shares, capacities)
    return [max(1, round(count / step)) * step for count, step in zip(counts, steps, strict=True)]


def at_least_one_each(total: int, sizes: Sequence[int]) -> int:
    """Return `total`, or the number of layers that are not empty and a warning, if that is larger."""
    layers = sum(size > 0 for size in sizes)
    if total < layers:
        warnings.warn(
            f"A density of {total} of {sum(sizes)} weights leaves less than one in each of {layers} layers: each keeps "
            f"one, {layers} in all. Pass a larger density, or masks as sparse_init.",
            stacklevel=2,
        )
    return max(total, layers)


def none_empty(counts: list[int], sizes: Sequence[int]) -> list[int]:
    """Give an empty layer one weight of the largest count, while that has two or more.

    >>> none_empty([0, 3, 5], sizes=[10, 10, 10])
    [1, 3, 4]
    """
    counts = list(counts)
    for i, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if count == 0 and size > 0 and max(counts) > 1:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


DISTRIBUTIONS: dict[str, Distribution] = {
    "constant": uniform,
    "linear": erdos_renyi,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}
