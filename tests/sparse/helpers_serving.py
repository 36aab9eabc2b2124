"""Models to serve, and inputs of any number of rows for them."""

import torch
import torch.nn.functional as F
import torchvision
from helpers_conversion import sparsify
from torch import nn

from sparselearning.models import build

NAMES = ("mlp", "lenet5", "alexnet-s", "vgg-d", "wrn-16-8", "resnet18", "gpt")


class Block(nn.Module):
    """A block of a transformer that computes its attention itself, so that its linear layers can be sparse."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(self.first(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.second(x))


class SmallGPT(nn.Module):
    """Two blocks between an embedding and a head that share their weight."""

    def __init__(self, words=50, width=32, length=16):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.blocks(self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))))


def served_model(name):
    """Return a sparse model, and a function from a number of rows to its input."""
    if name == "mlp":
        layers = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        return sparsify(nn.Sequential(*layers)), lambda rows: torch.randn(rows, 784)
    if name == "gpt":
        return sparsify(SmallGPT(), 0.2), lambda rows: torch.randint(0, 50, (rows, 16))
    if name == "resnet18":
        return sparsify(torchvision.models.resnet18(num_classes=10)), lambda rows: torch.randn(rows, 3, 32, 32)
    shape = (1, 28, 28) if name == "lenet5" else (3, 32, 32)
    return sparsify(build(name)), lambda rows: torch.randn(rows, *shape)
