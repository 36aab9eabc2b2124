"""Guided stochastic exploration: candidates for growth that are drawn where gradients can be large.

Heddes, Srinivasa, Givargis & Nicolau 2024, Always-Sparse Training by Growing Connections with Guided Stochastic
Exploration, https://arxiv.org/abs/2401.06898. The gradient of the connection from input j to output i is the sum over
a batch of x_j dy_i, hence at most |x_j| |dy_i| for the norms over the batch (the paper's GraBo). An input and an output
drawn apart, in proportion to their norms, are a connection drawn in proportion to this bound; no table of connections
is needed. The caller computes the exact gradients of the candidates, and `best_of` them grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparselearning.compact import positions
from sparselearning.sparse.growing import inactive_of, random_outside


def guided_candidates(
    x_norm: Tensor,
    dy_norm: Tensor,
    start: Tensor,
    column: Tensor,
    width: int,
    number: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the positions (ascending) of the inactive among `number` connections drawn by their bound, once each.

    `x_norm` (width,) and `dy_norm` (rows,) are norms over a batch; the authors' code takes the sum of absolute values.
    """
    drawn = draw_connections(x_norm, dy_norm, number, generator)
    return inactive_of(drawn.unique(), start, column, width)


def draw_connections(x_norm: Tensor, dy_norm: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the positions of `number` connections, drawn with replacement in proportion to x_norm[j] * dy_norm[i]."""
    number = number if len(x_norm) and len(dy_norm) else 0
    row = draw(dy_norm, number, generator)
    return row * len(x_norm) + draw(x_norm, number, generator)


def draw(norm: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Return `number` indices, drawn with replacement in proportion to `norm`.

    Norms that are negative or not finite count as zero; if all are zero, each index has the same chance.
    """
    if number <= 0:
        return torch.empty(0, dtype=torch.int64, device=norm.device)
    share = norm.detach().double().nan_to_num(nan=0, posinf=0, neginf=0).clamp_(min=0)
    if not share.any():
        share = torch.ones_like(share)
    # On the CPU: on a GPU, deterministic algorithms refuse running sums of floats.
    below = (share / share.max()).cpu().cumsum(0).to(share.device)
    at = torch.rand(number, dtype=below.dtype, device=below.device, generator=generator) * below[-1]
    # Rounded up to the sum, a number would be behind the last index that has a share.
    last = torch.searchsorted(below, below[-1:])
    return torch.minimum(torch.searchsorted(below, at, right=True), last)


def filled_up(
    position: Tensor,
    gradient: Tensor,
    start: Tensor,
    column: Tensor,
    width: int,
    k: int,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return inactive entries, and if they are fewer than k others at random besides, with gradient 0.

    Positions are ascending. If fewer than k entries are inactive, all are returned.
    """
    if len(position) >= k:
        return position, gradient
    taken = torch.cat([positions(start, column, width), position]).sort().values
    more = random_outside(taken, (len(start) - 1) * width, k - len(position), generator)
    merged, order = torch.cat([position, more]).sort()
    return merged, torch.cat([gradient, gradient.new_zeros(len(more))])[order]
