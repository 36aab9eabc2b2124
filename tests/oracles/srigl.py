"""One update of one layer as SRigL does it, in plain Python, written from the authors' code.

Lasby et al. 2024, https://arxiv.org/abs/2305.02299; calgaryml/condensed-sparsity, src/rigl_torch/rigl_constant_fan.py,
with `use_sparse_const_fan_in_for_ablation` (the paper's setting). Matrices are lists of rows, a row for each neuron.
"""

from fractions import Fraction

from oracles import distributions, rigl
from oracles.network import Move, exactly, magnitudes, rounded_up
from oracles.reference import drop_lowest, round_to

moves = rigl.moves


def kept_neurons(weight, gradient, active, number_pruned, gamma, fan_in):
    """Return the indices of the neurons that are not ablated.

    `active` are the masks before the update, and `fan_in` is that of all neurons without ablation.
    """
    outputs, inputs = len(weight), len(weight[0])
    entries = [(i, j) for i in range(outputs) for j in range(inputs)]
    number_kept = sum(map(sum, active)) - number_pruned
    by_weight = sorted(entries, key=lambda e: -abs(weight[e[0]][e[1]]) * active[e[0]][e[1]])
    by_gradient = sorted(entries, key=lambda e: -abs(gradient[e[0]][e[1]]))
    salient = set(by_weight[:number_kept]) | set(by_gradient[:number_pruned])
    counts = [sum((i, j) in salient for j in range(inputs)) for i in range(outputs)]
    at_least = max(1, int(gamma * fan_in))
    smallest = outputs * fan_in // inputs  # neurons that would hold all weights
    at_least = min(at_least, sorted(counts, reverse=True)[min(smallest, outputs - 1)])
    return [i for i in range(outputs) if counts[i] >= at_least]


def shared_fan_in(outputs, fan_in, kept):
    """Return the fan-in of the neurons that are kept."""
    return outputs * fan_in // len(kept)


def grown(weight, gradient, active, number_pruned, kept, fan_in):
    """Return the masks after the update, where no neuron that is removed has a weight that pruning left."""
    outputs, inputs = len(weight), len(weight[0])
    entries = [(i, j) for i in range(outputs) for j in range(inputs) if active[i][j]]
    left = sorted(entries, key=lambda e: -abs(weight[e[0]][e[1]]))[: len(entries) - number_pruned]
    masks = [[0] * inputs for _ in range(outputs)]
    for i, j in left:
        masks[i][j] = 1
    for i in kept:
        others = sorted((j for j in range(inputs) if not masks[i][j]), key=lambda j: -abs(gradient[i][j]))
        for j in others[: fan_in - sum(masks[i])]:
            masks[i][j] = 1
    return masks


def start(layers, course):
    """Return the number of active weights of each matrix: ERK, rounded to the same number for every neuron.

    As many for every neuron as are nearest to the share of the layer, at least one; the output layer too.
    """
    total, sizes = exactly(layers, course), [layer.size for layer in layers]
    real = distributions.erdos_renyi_kernel([layer.shape for layer in layers], Fraction(total, sum(sizes)))
    counts = round_to(total, real, sizes)
    return [max(1, round(count / layer.shape[0])) * layer.shape[0] for count, layer in zip(counts, layers, strict=True)]


def update(layers, step, course):
    """Return what becomes of linear layers; neurons of the last one, the outputs, are not ablated.

    The authors prune again where pruning left weights of an ablated neuron, or more than the new fan-in; the library
    places these weights by the gradient. Then the oracle says how many weights each neuron has, not which: `grown` is a
    list of numbers, or None where earlier updates left weights over that found no place.
    """
    fan_ins = course.memory.setdefault("fan_in", [layer.active // layer.shape[0] for layer in layers])
    found = []
    for i, layer in enumerate(layers):
        outputs, inputs = layer.shape
        weight, gradient, mask = (
            [part[j : j + inputs] for j in range(0, layer.size, inputs)]
            for part in (layer.weight, layer.gradient, layer.mask)
        )
        fan_in = fan_ins[i]
        pruned = rounded_up(rigl.rate(step, course) * layer.active)
        kept = list(range(outputs))
        if i < len(layers) - 1:
            kept = kept_neurons(weight, gradient, mask, pruned, 0.3, fan_in)
        shared = shared_fan_in(outputs, fan_in, kept)
        left = drop_lowest(magnitudes(layer), layer.mask, pruned)
        rows = [sum(left[j : j + inputs]) for j in range(0, layer.size, inputs)]
        if layer.active < outputs * fan_in:
            found.append(Move([], None, forget=True))
        elif any(row > (shared if j in kept else 0) for j, row in enumerate(rows)):
            found.append(Move([], [shared if j in kept else 0 for j in range(outputs)], forget=True))
        else:
            masks = grown(weight, gradient, mask, pruned, kept, shared)
            found.append(Move([False] * layer.size, [bool(m) for row in masks for m in row], forget=True))
    return found
