"""SynFlow: Tanaka et al. 2020, https://arxiv.org/abs/2006.05467, algorithm 1; read beside ganguli-lab/Synaptic-Flow.

Before training, in 100 rounds: R is the sum of the outputs of the network of absolute parameters for an input of ones;
round t keeps the weights of the network with the largest |w dR/dw|, among those that are left, density^(t/100) of all.
Their code removes int((1 - density^(t/100)) * size) and all that tie with the last. No updates.

For linear layers with ReLU in between, without biases or with: R = 1^T |W_L| ... |W_1| 1, in loops over Python numbers.
"""

import torch

from oracles import static
from oracles.network import highest_of_network

moves = static.moves
ROUNDS = 100


def start(matrices, biases, density, rounds=ROUNDS):
    """Return the masks of a chain of linear layers, given as lists of rows, and of biases, as flat lists of bools."""
    masks = [[[True] * len(matrix[0]) for _ in matrix] for matrix in matrices]
    size = sum(len(matrix) * len(matrix[0]) for matrix in matrices)
    for t in range(1, rounds + 1):
        weights = [
            [[abs(w) * m for w, m in zip(*rows, strict=True)] for rows in zip(matrix, mask, strict=True)]
            for matrix, mask in zip(matrices, masks, strict=True)
        ]
        score = [
            [value if active else -1.0 for value, active in zip(values, [m for row in mask for m in row], strict=True)]
            for values, mask in zip(flows(weights, biases), masks, strict=True)
        ]
        chosen = highest_of_network(score, round(density ** (t / rounds) * size))
        masks = [_rows(flat, len(matrix[0])) for flat, matrix in zip(chosen, matrices, strict=True)]
    return [[m for row in mask for m in row] for mask in masks]


def flows(weights, biases):
    """Return |w dR/dw| of every entry: w_ij times what reaches j times what i passes on to the outputs."""
    reaching = [[1.0] * len(weights[0][0])]
    for matrix, bias in zip(weights, biases, strict=True):
        reaching.append(
            [
                sum(w * x for w, x in zip(row, reaching[-1], strict=True)) + abs(b)
                for row, b in zip(matrix, bias, strict=True)
            ]
        )
    passing = [[1.0] * len(weights[-1])]
    for matrix in reversed(weights):
        passing.insert(
            0, [sum(matrix[i][j] * passing[0][i] for i in range(len(matrix))) for j in range(len(matrix[0]))]
        )
    return [
        [matrix[i][j] * reaching[n][j] * passing[n + 1][i] for i in range(len(matrix)) for j in range(len(matrix[0]))]
        for n, matrix in enumerate(weights)
    ]


def _rows(flat, width):
    return [flat[i : i + width] for i in range(0, len(flat), width)]


def masks(model, batches, density):
    """Return the masks of a chain of linear layers by name; SynFlow needs no data."""
    parameters = dict(model.named_parameters())
    weights = {name: parameter.tolist() for name, parameter in parameters.items() if parameter.dim() == 2}
    biases = [parameter.tolist() for parameter in parameters.values() if parameter.dim() == 1]
    chosen = start(list(weights.values()), biases, density)
    return {
        name: torch.tensor(mask).reshape(parameters[name].shape) for name, mask in zip(weights, chosen, strict=True)
    }
