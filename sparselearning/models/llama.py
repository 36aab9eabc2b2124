"""LLaMA's transformer (Touvron et al. 2023): rotary positions, RMSNorm before each part, SwiGLU, no biases.

Attention and MLP are linear layers, which masks go on; the embedding and the head, which has its shape, stay dense.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselearning.models.attention import Cache, Past, attend, check_sizes, join_heads, split_heads
from sparselearning.models.dropout import Dropout


class Attention(nn.Module):
    """Each token looks at itself and at those before it; groups of heads may share keys and values."""

    def __init__(self, block: int, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.block, self.heads, self.kv_heads, self.dropout = block, heads, kv_heads, dropout
        size = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * size, bias=False)
        self.value = nn.Linear(width, kv_heads * size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Cache | Past | None) -> Tensor:
        query = rotate(split_heads(self.query(x), self.heads), turns)
        keys = rotate(split_heads(self.key(x), self.kv_heads), turns)
        values = split_heads(self.value(x), self.kv_heads)
        if cache is not None:
            return self.out(join_heads(cache.attend(self.block, query, keys, values)))
        return self.out(join_heads(attend(query, keys, values, self.dropout if self.training else 0.0)))


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x_i, x_{i + size/2}) by the angles of their positions: Su et al. 2021, RoFormer.

    Args:
        x: [batch, heads, tokens, size].
        turns: cosines and sines of the angles, [tokens, size / 2] each.
    """
    cos, sin = (turn.to(x.dtype) for turn in turns)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, block: int, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(block, width, heads, kv_heads, dropout)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = MLP(width, -(-8 * width // 24) * 8)  # 8/3 of the width, a multiple of 8
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], cache: Cache | Past | None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), turns, cache))
        return x + self.drop(self.mlp(self.norm2(x)))


class Llama(nn.Module):
    """Maps tokens [batch, tokens] to the logits of the next ones, [batch, tokens, vocabulary].

    `kv_heads` is the number of heads of keys and values (None: as many as `heads`); the others are as in `gpt.GPT`.

    Raises:
        ValueError: if `heads` do not divide `width` into even sizes, or `kv_heads` do not divide `heads`.
    """

    cos: Tensor  # of the angles of each position, [context, size / 2]
    sin: Tensor

    def __init__(
        self, vocabulary: int, layers: int = 6, width: int = 384, heads: int = 6, context: int = 128,
        dropout: float = 0.0, tied: bool = False, kv_heads: int | None = None,
    ):  # fmt: skip
        super().__init__()
        check_sizes(width, heads, kv_heads)
        if width // heads % 2:
            raise ValueError(f"Expected heads of an even size, for rotary positions, got {width // heads}.")
        self.tokens = nn.Embedding(vocabulary, width)
        shape = width, heads, kv_heads or heads, dropout
        self.blocks = nn.ModuleList(Block(block, *shape) for block in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight
        half = width // heads // 2
        angles = torch.arange(context)[:, None] * 10000 ** -(torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def new_cache(self) -> Cache:
        """Return an empty cache for `forward`, which then gets new tokens alone."""
        return Cache()

    def forward(self, tokens: Tensor, cache: Cache | Past | None = None) -> Tensor:
        first = cache.tokens if cache is not None else 0
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        turns = self.cos[places], self.sin[places]
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, turns, cache)
        return self.head(self.norm(x))
