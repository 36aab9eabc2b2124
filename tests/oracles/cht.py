"""CHT: Zhang et al. 2024, https://openreview.net/forum?id=iayEcORsGd; read beside their code (CH_scores_new_v2.cpp).

At the end of every epoch, layer by layer: a fraction of the weights leaves, the smallest, and as many come: in a linear
layer the links with the highest CH3-L3p score, computed from what is left. In the bipartite graph of a layer, for
nodes u (an input) and v (an output) without a link,

    score(u, v) = sum over paths u - a - b - v of 1 / sqrt((1 + e(a)) (1 + e(b)))

e(a) counts the neighbours of a that are neither u nor v nor in the local community, which are the nodes of all such
paths. Links without a path come after all others, at random, as do all links of convolutions, which the paper keeps
dense. The library starts from an Erdos-Renyi mask, and lets the fraction fall as SET does.
"""

from oracles import set as set_
from oracles.network import Move, magnitudes, rounded_up
from oracles.reference import drop_lowest

start, moves, rate = set_.start, set_.moves, set_.rate


def update(layers, step, course):
    found = []
    for layer in layers:
        k = rounded_up(rate(step, course) * layer.active)
        kept = drop_lowest(magnitudes(layer), layer.mask, k)
        score = None
        if len(layer.shape) == 2:
            score = [value for row in scores(kept, *layer.shape) for value in row]
        found.append(Move(kept, k, score))
    return found


def scores(mask, outputs, inputs):
    """Return the score of every link that is absent from a flat mask, by loops over paths; 0 for those that are not."""
    inputs_of = [{u for u in range(inputs) if mask[v * inputs + u]} for v in range(outputs)]
    outputs_of = [{v for v in range(outputs) if mask[v * inputs + u]} for u in range(inputs)]
    table = [[0.0] * inputs for _ in range(outputs)]
    for v in range(outputs):
        for u in set(range(inputs)) - inputs_of[v]:
            paths = [(a, b) for a in outputs_of[u] for b in inputs_of[v] if b in inputs_of[a]]
            through_outputs, through_inputs = {a for a, _ in paths}, {b for _, b in paths}
            external_a = {a: len(inputs_of[a] - through_inputs - {u}) for a in through_outputs}
            external_b = {b: len(outputs_of[b] - through_outputs - {v}) for b in through_inputs}
            table[v][u] = sum(((1 + external_a[a]) * (1 + external_b[b])) ** -0.5 for a, b in paths)
    return table
