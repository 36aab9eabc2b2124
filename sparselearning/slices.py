"""Slices of a weight of which none may be empty: weight_norm divides each by its norm."""

import torch
from torch import Tensor


def by_slice(tensor: Tensor, dim: int) -> Tensor:
    """Return the tensor as a matrix with a row for each slice along `dim`; one row for -1."""
    return tensor.reshape(1, -1) if dim < 0 else tensor.movedim(dim, 0).flatten(1)


def number_of_slices(shape: torch.Size, dim: int | None) -> int:
    """Return how many weights a layer keeps at least: one for each slice along `dim`; 1 for None."""
    return 1 if dim is None or dim < 0 else shape[dim]


def largest_of_each(score: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the mask of the active entry with the highest score in each slice that has one.

    >>> largest_of_each(torch.tensor([[1., 3.], [2., 1.]]), torch.tensor([[True, True], [True, False]]), 0)
    tensor([[False,  True],
            [ True, False]])
    """
    rows, active = by_slice(score, dim), by_slice(mask, dim)
    best = rows.float().masked_fill(~active, -torch.inf).argmax(1, keepdim=True)
    highest = torch.zeros_like(active, memory_format=torch.contiguous_format).scatter(1, best, True) & active
    return highest.reshape(mask.shape) if dim < 0 else highest.reshape(mask.movedim(dim, 0).shape).movedim(0, dim)


def are_empty(mask: Tensor, dim: int) -> Tensor:
    """Return the mask of all entries of the slices in which nothing is active."""
    moved = mask if dim < 0 else mask.movedim(dim, 0)
    empty = ~by_slice(mask, dim).any(1)
    empty = empty.expand(mask.shape) if dim < 0 else empty.view(-1, *[1] * (mask.dim() - 1)).expand(moved.shape)
    return empty if dim < 0 else empty.movedim(0, dim)
