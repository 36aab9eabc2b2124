"""How many weights of a layer have been active at any time, without a list of them."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 2**16  # hashes that are kept
TOGETHER = 2**14  # positions that are hashed at once, in a cache


class Explored:
    """The number of different positions that were ever added.

    Exact up to `MOST` of them. Beyond, the `MOST` smallest hashes of positions are kept, and the number follows from
    the largest of these (k minimum values: Bar-Yossef et al. 2002, Counting Distinct Elements in a Data Stream,
    https://doi.org/10.1007/3-540-45726-7_1); the standard error is 1 / sqrt(MOST), 0.4%. Hashes are of the positions
    alone, so that runs that explore the same weights count the same.
    """

    def __init__(self, hashes: Tensor | None = None):
        self.hashes = torch.zeros(0, dtype=torch.int64) if hashes is None else hashes  # ascending

    def add(self, position: Tensor) -> None:
        """Add positions, int64."""
        new = torch.cat([self.lower(mixed(part)) for part in position.cpu().split(TOGETHER)])
        if len(new):
            self.hashes = torch.cat([self.hashes, new]).unique()[:MOST].clone()

    def lower(self, hashes: Tensor) -> Tensor:
        """Return those hashes that may be among the smallest."""
        return hashes if len(self.hashes) < MOST else hashes[hashes < self.hashes[-1]]

    @property
    def count(self) -> int:
        """How many different positions there were."""
        if len(self.hashes) < MOST:
            return len(self.hashes)
        return round((MOST - 1) / ((int(self.hashes[-1]) + 2**63) / 2**64))


def mixed(position: Tensor) -> Tensor:
    """Return a hash of each position, int64; different positions have different ones (the finalizer of splitmix64)."""
    mixed = position.clone()
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed ^= mixed.bitwise_right_shift(shift) & ((1 << (64 - shift)) - 1)
        mixed *= factor
    return mixed ^ (mixed.bitwise_right_shift(31) & ((1 << 33) - 1))
