"""How papers divide the active weights of a network among its layers at the start.

A layer is a shape (outputs, inputs, kernel...). `erdos_renyi` and `erdos_renyi_kernel` follow google-research/rigl,
rigl/sparse_utils.py: the density of a layer is epsilon * p, p = (inputs + outputs) / (inputs * outputs), or with the
kernel p = sum(shape) / prod(shape). Where the largest density would exceed 1, the layers that have it become dense,
and epsilon is computed again for the others, so that the number of weights of the network is that of the density. Their
code rounds each layer (it removes floor(sparsity * size) weights); here the numbers stay real.
"""

import math
from fractions import Fraction


def uniform(shapes, density, dense=()):
    """Every layer has the density; the layers whose places are in `dense` have all weights, beside it."""
    return [math.prod(shape) * (1 if i in dense else density) for i, shape in enumerate(shapes)]


def erdos_renyi(shapes, density):
    """Mocanu et al. 2018, equation 1: the probability of a connection is epsilon (n + m) / (n m)."""
    return _scaled(shapes, density, lambda shape: Fraction(shape[0] + shape[1], shape[0] * shape[1]))


def erdos_renyi_kernel(shapes, density):
    """Evci et al. 2020, section 3(1): 1 - (n + m + w + h) / (n m w h) is the sparsity, up to a factor."""
    return _scaled(shapes, density, lambda shape: Fraction(sum(shape), math.prod(shape)))


def _scaled(shapes, density, probability):
    sizes = [math.prod(shape) for shape in shapes]
    raw = [probability(shape) for shape in shapes]
    dense = set()
    while True:
        scaled = [i for i in range(len(shapes)) if i not in dense]
        left = sum(density * sizes[i] for i in scaled) - sum((1 - density) * sizes[i] for i in dense)
        if not scaled:
            return [float(size) for size in sizes]
        epsilon = left / sum(raw[i] * sizes[i] for i in scaled)
        largest = max(raw[i] for i in scaled)
        if epsilon * largest <= 1:
            return [sizes[i] if i in dense else epsilon * raw[i] * sizes[i] for i in range(len(shapes))]
        dense |= {i for i in scaled if raw[i] == largest}
