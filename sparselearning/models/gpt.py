"""GPT-2's transformer (Radford et al. 2019), without biases: learned positions, LayerNorm before each part, GELU.

Attention and MLP are linear layers, which masks go on; the embeddings and the head, which has their shape, stay dense.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselearning.models.attention import Cache, Past, attend, check_sizes, join_heads, split_heads
from sparselearning.models.dropout import Dropout


class Attention(nn.Module):
    """Each token looks at itself and at those before it."""

    def __init__(self, block: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.block, self.heads, self.dropout = block, heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: Cache | Past | None) -> Tensor:
        query, keys, values = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            return self.out(join_heads(cache.attend(self.block, query, keys, values)))
        return self.out(join_heads(attend(query, keys, values, self.dropout if self.training else 0.0)))


class MLP(nn.Module):
    """Each token by itself: four times as wide, and back."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, block: int, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = Attention(block, width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache | Past | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Maps tokens [batch, tokens] to the logits of the next ones, [batch, tokens, vocabulary].

    Args:
        context: the most tokens that it reads.
        dropout: the fraction of activations and of attention that training drops.
        tied: whether the head is the embedding, as in GPT-2.

    Raises:
        ValueError: if `heads` do not divide `width`.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int = 6,
        width: int = 384,
        heads: int = 6,
        context: int = 128,
        dropout: float = 0.0,
        tied: bool = True,
    ):
        super().__init__()
        check_sizes(width, heads)
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.drop = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(block, width, heads, dropout) for block in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:  # what is added to x starts smaller, for 2 x layers terms are added
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def new_cache(self) -> Cache:
        """Return an empty cache for `forward`, which then gets new tokens alone."""
        return Cache()

    def forward(self, tokens: Tensor, cache: Cache | Past | None = None) -> Tensor:
        first = cache.tokens if cache is not None else 0
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.drop(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x, cache)
        return self.head(self.norm(x))
