"""Sparsity distributions: from the shape of a weight to its share of the network's active weights."""

import math
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

    The total is exact. A layer takes at most its size, what is over goes to the others. No layer is left
    empty while another has two weights or more, for nothing would ever flow through it.

    >>> active_counts([(10, 100), (5, 10)], density=0.1, distribution=erdos_renyi_kernel)
    [92, 13]
    """
    sizes = [math.prod(shape) for shape in shapes]
    counts = apportion(round(density * sum(sizes)), [distribution(shape) for shape in shapes], sizes)
    return none_empty(counts, sizes)


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
