"""DSR: Mostafa & Wang 2019, https://arxiv.org/abs/1902.05967, algorithm 1; read beside the authors' code,
IntelAI/dynamic-reparameterization.

Every 100 steps: |weights| below a threshold H leave, the same for all layers (of a layer that would lose all, one
stays); H begins at 0.001, is halved when more than 1.1 of the intended number left, and doubled below 0.9. The freed
number K comes at random: layer i gets K R_i / sum_j R_j, where R_i is what pruning left it. What a full layer cannot
take is divided among all layers in the same proportions, again and again.

Their code intends a fixed number and rounds each share, the difference to a random layer; what has just left does not
come back at once. The library intends a fraction of the active weights, 0.2 that falls as a cosine, and rounds by
largest remainders.
"""

from fractions import Fraction

from oracles import schedules, sparse_momentum
from oracles.network import Move, magnitudes, rounded_up
from oracles.reference import apportion, drop_lowest

start = sparse_momentum.start


def moves(step, course):
    return step % course.every == 0


def rate(step, course):
    return schedules.cosine(0.2, step, course.steps, lowest=0.005)


def update(layers, step, course):
    threshold, kept = course.memory.get("threshold", 0.001), []
    for layer in layers:
        mask = [active and abs(value) >= threshold for active, value in zip(layer.mask, layer.weight, strict=True)]
        if not any(mask) and any(layer.mask):
            mask = drop_lowest(magnitudes(layer), layer.mask, layer.active - 1)
        kept.append(mask)
    left = [sum(mask) for mask in kept]
    pruned = sum(layer.active for layer in layers) - sum(left)
    numbers = apportion(
        pruned, [Fraction(n) for n in left], [layer.size - n for layer, n in zip(layers, left, strict=True)]
    )
    intended = sum(rounded_up(rate(step, course) * layer.active) for layer in layers)
    if pruned > 1.1 * intended:
        threshold /= 2
    elif pruned < 0.9 * intended:
        threshold *= 2
    course.memory["threshold"] = threshold
    return [Move(mask, number) for mask, number in zip(kept, numbers, strict=True)]
