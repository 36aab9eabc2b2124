"""CHTs: Zhang et al. 2025, https://arxiv.org/abs/2501.19107, section 3; read beside the authors' code,
biomedical-cybernetics/Cannistraci-Hebb-Training-Soft-Rule-.

Every 100 steps until 75% of the training, layer by layer: a fraction of the weights leaves, 0.1 (of language models)
that falls to 0 as a cosine, and as many come. Those that stay are drawn without replacement in proportion to

    |w|^(d / (1 - d)),  d from 0.5 to 0.9 on a line                                     `keeping`

and those that come, in proportion to CH2-L3n of what is left. For nodes u (an input) and v (an output) without a link,

    score(u, v) = sum over nodes z between them of (1 + i(z)) / (1 + e(z))              `scores`

The nodes between them, the local community, are those of all paths u - a - b - v; i(z) are the links of z to others of
them, and e(z) those to nodes that are neither of them nor u or v. Links without a path come last, at random, as do all
links of convolutions, which the paper does not treat. What was inactive starts at zero, without momentum.

A network begins with receptive fields: input j of output i in proportion to (1 + distance)^-((1 - r) / r), without
replacement, both lying on a ring (`shares`); all outputs have equally many, and r is 0.25.
"""

from oracles import rigl, schedules, sparse_momentum

start, moves = sparse_momentum.start, rigl.moves


def rate(step, course):
    return schedules.cosine(0.1, step, round(rigl.END * course.steps))


def keeping(magnitude, progress):
    """Return what a weight is kept in proportion to."""
    softness = 0.5 + 0.4 * progress
    return magnitude ** (softness / (1 - softness))


def scores(mask, outputs, inputs):
    """Return the score of every link that is absent from a flat mask, by loops over nodes; 0 for those that are not."""
    inputs_of = [{u for u in range(inputs) if mask[v * inputs + u]} for v in range(outputs)]
    outputs_of = [{v for v in range(outputs) if mask[v * inputs + u]} for u in range(inputs)]
    table = [[0.0] * inputs for _ in range(outputs)]
    for v in range(outputs):
        for u in set(range(inputs)) - inputs_of[v]:
            paths = [(a, b) for a in outputs_of[u] for b in inputs_of[v] if b in inputs_of[a]]
            left, right = {a for a, _ in paths}, {b for _, b in paths}
            for a in left:
                table[v][u] += (1 + len(inputs_of[a] & right)) / (1 + len(inputs_of[a] - right - {u}))
            for b in right:
                table[v][u] += (1 + len(outputs_of[b] & left)) / (1 + len(outputs_of[b] - left - {v}))
    return table


def shares(output, outputs, inputs, r=0.25):
    """Return the chance of each input to be drawn first by an output."""
    place = output * inputs / outputs
    distances = [min(abs(j - place), inputs - abs(j - place)) for j in range(inputs)]
    weights = [(1 + distance) ** -((1 - r) / r) for distance in distances]
    return [weight / sum(weights) for weight in weights]


def kept_sets(weights, k):
    """Return the chance of each set of k numbers, drawn one after the other in proportion to their weights."""
    chances = {frozenset(): 1.0}
    for _ in range(k):
        further = {}
        for chosen, chance in chances.items():
            left = sum(weight for i, weight in enumerate(weights) if i not in chosen)
            for i, weight in enumerate(weights):
                if i not in chosen:
                    wider = chosen | {i}
                    further[wider] = further.get(wider, 0.0) + chance * weight / left
        chances = further
    return chances
