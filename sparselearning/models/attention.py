"""Causal attention, and a cache of keys and values, with which a model reads each token once."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Cache:
    """The keys and values of the tokens that a model has read, [batch, heads, tokens, size] for each block."""

    def __init__(self):
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def tokens(self) -> int:
        """How many tokens the model has read."""
        return self.kept[0][0].shape[2] if self.kept else 0

    def attend(self, block: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Add keys and values of new tokens in a block; let these tokens look at all."""
        if block in self.kept:
            before = self.kept[block]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.kept[block] = keys, values
        return attend(query, keys, values)


class Past:
    """The same in one tensor, [1 + tokens, blocks, 2, batch, heads, size], for one new token: as programs take it.

    The first row is nobody's, so that there always is one.
    """

    def __init__(self, kept: Tensor):
        self.kept = kept
        self.added: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """How many tokens the model has read."""
        return self.kept.shape[0] - 1

    def attend(self, block: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Add keys and values of the new token in a block; let it look at all."""
        self.added.append(torch.stack([keys, values]))
        before = self.kept[:, block].permute(1, 2, 3, 0, 4)
        keys, values = torch.cat([before, self.added[-1]], dim=3)
        seen = torch.arange(keys.shape[2], device=keys.device) > 0
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, seen[None, :], enable_gqa=grouped)

    def extended(self) -> Tensor:
        """Return the keys and values with those of the new token."""
        return torch.cat([self.kept, torch.stack(self.added).permute(4, 0, 1, 2, 3, 5)])


def attend(query: Tensor, keys: Tensor, values: Tensor, dropout: float = 0.0) -> Tensor:
    """Let the last tokens look at themselves and at all before: softmax(Q K^T / sqrt(size)) V.

    Args:
        query: of the last `new` tokens, [batch, heads, new, size].
        keys, values: of all tokens, [batch, heads or a divisor of them, tokens, size].
        dropout: the fraction of looks that are dropped.
    """
    new, tokens, grouped = query.shape[2], keys.shape[2], query.shape[1] != keys.shape[1]
    if new == tokens:
        return F.scaled_dot_product_attention(
            query, keys, values, dropout_p=dropout, is_causal=True, enable_gqa=grouped
        )
    seen = torch.ones(new, tokens, dtype=torch.bool, device=query.device).tril(tokens - new)
    return F.scaled_dot_product_attention(query, keys, values, seen, dropout, enable_gqa=grouped)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn [batch, tokens, heads x size] into [batch, heads, tokens, size]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Turn [batch, heads, tokens, size] into [batch, tokens, heads x size]."""
    return x.transpose(1, 2).flatten(2)


def check_sizes(width: int, heads: int, kv_heads: int | None = None) -> None:
    """Check that heads divide the width, and key/value heads the heads.

    Raises:
        ValueError: if they do not.
    """
    if width % heads:
        raise ValueError(f"Expected a width that {heads} heads divide, got {width}.")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"Expected a number of heads that {kv_heads} key/value heads divide, got {heads}.")
