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

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens in a block; return those of all tokens."""
        if block in self.kept:
            before = self.kept[block]
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        self.kept[block] = keys, values
        return keys, values


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
