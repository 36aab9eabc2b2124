"""Sparse momentum as slow loops over Python numbers, written from the paper and from release 1.0.

    k_i = ceil(p_i * nnz_i)                      how many to remove in layer i
    r_i = mean(|M_i| over active) / sum_j        importance of layer i
    m_i <- drop_lowest(|W_i|, m_i, k_i)          prune
    g_i = min(0.99 room_i, r_i sum_j k_j + e)    redistribute; e: the excess that full layers leave to each layer
    m_i <- add_highest(|M_i|, m_i, g_i)          grow

A layer is a flat list; a network is a list of layers.
"""

import math
from fractions import Fraction


def drop_lowest(score, mask, k):
    """Drop the k active entries of lowest score; of equal ones the earlier goes first."""
    candidates = sorted((score[i], i) for i in range(len(mask)) if mask[i])
    dropped = {i for _, i in candidates[:k]}
    return [active and i not in dropped for i, active in enumerate(mask)]


def add_highest(score, mask, k):
    """Add the k inactive entries of highest score; of equal ones the earlier comes first."""
    candidates = sorted((-score[i], i) for i in range(len(mask)) if not mask[i])
    added = {i for _, i in candidates[:k]}
    return [active or i in added for i, active in enumerate(mask)]


def apportion(total, shares, capacity):
    """Divide by largest remainders, in exact fractions; a part whose quota exceeds its room is filled before."""
    counts = [0] * len(shares)
    unfilled = [i for i, room in enumerate(capacity) if room > 0]
    while total:
        share = {i: Fraction(shares[i]) for i in unfilled}
        if not any(share.values()):
            share = dict.fromkeys(unfilled, Fraction(1))
        quota = {i: total * share[i] / sum(share.values()) for i in unfilled}
        full = [i for i in unfilled if quota[i] >= capacity[i]]
        for i in full:
            counts[i] = capacity[i]
            total -= capacity[i]
            unfilled.remove(i)
        if not full:
            for i in unfilled:
                counts[i] = math.floor(quota[i])
            total -= sum(counts[i] for i in unfilled)
            by_remainder = sorted(unfilled, key=lambda i: (counts[i] - quota[i], i))
            for i in by_remainder[:total]:
                counts[i] += 1
            return counts
    return counts


def redistribute(total, shares, capacity):
    """Add the mean of what does not fit to all layers, again and again: `calc_growth_redistribution` of release 1.0.

    In exact fractions until a millionth of a weight is left. 1.0 rounds the first numbers up and the last ones down,
    which loses or adds weights; here the last ones are rounded by largest remainders.
    """
    grown = [Fraction(share) * total / sum(map(Fraction, shares)) for share in shares]
    mean_excess = Fraction(0)
    while True:
        excess = Fraction(0)
        for i, room in enumerate(capacity):
            grown[i] += mean_excess
            if grown[i] > room:
                excess += grown[i] - room
                grown[i] = Fraction(room)
        mean_excess = (excess / len(grown)).limit_denominator(10**12)
        if excess < Fraction(1, 10**6):
            return round_to(total, grown, capacity)


def round_to(total, numbers, capacity):
    """Round down, then add one to the largest remainders (to a millionth; of equals to the earlier) up to `total`."""
    counts = [
        min(math.floor(number + Fraction(1, 10**6)), room) for number, room in zip(numbers, capacity, strict=True)
    ]
    open_ = [i for i in range(len(counts)) if counts[i] < capacity[i]]
    by_remainder = sorted(open_, key=lambda i: (-round(numbers[i] - counts[i], 5), i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def update(weights, momenta, masks, prune_rate):
    """Return the masks of a network after one update."""
    layers = range(len(masks))
    nonzeros = [sum(mask) for mask in masks]
    strength = [
        math.fsum(abs(momenta[i][j]) for j, active in enumerate(masks[i]) if active) / max(nonzeros[i], 1)
        for i in layers
    ]
    importance = [r / sum(strength) if sum(strength) else 1 / len(masks) for r in strength]

    removed = []
    for i in layers:
        rate, sparsity = prune_rate, 1 - nonzeros[i] / len(masks[i])
        if sparsity < 0.2 and importance[i] > 1 / len(masks):
            rate = min(rate, sparsity)
        removed.append(math.ceil(rate * nonzeros[i]))
    pruned = [drop_lowest([abs(w) for w in weights[i]], masks[i], removed[i]) for i in layers]

    zeros = [mask.count(False) for mask in pruned]
    room = [math.floor(0.99 * z) for z in zeros]
    if sum(room) < sum(removed):
        room = zeros
    grown = redistribute(sum(removed), importance, room)
    for i in layers:  # a law of the library: no layer stays empty, the one that grows most gives a weight
        if removed[i] and not any(pruned[i]) and not grown[i] and zeros[i]:
            giver = max(layers, key=lambda j: (grown[j] * (grown[j] + sum(pruned[j]) > 1), -j))
            if grown[giver]:
                grown[giver], grown[i] = grown[giver] - 1, 1
    return [add_highest([abs(m) for m in momenta[i]], pruned[i], grown[i]) for i in layers]
