"""Text from a language model, token by token, with a cache of keys and values; and the model in a file."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning import sparse
from sparselearning.models.attention import Cache, Past
from sparselearning.sparse.programs import Program


@torch.no_grad()
def generate(
    model: Any,
    prompt: Sequence[int],
    count: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[int]:
    """Yield `count` tokens that follow the prompt; the model is in evaluation mode, and may be a converted one.

    The model reads the prompt once and then each new token alone. Of a longer prompt it reads the last `context`
    tokens. When these are full it begins anew with the last half of them.

    Args:
        model: maps tokens [1, n] and what its `new_cache` returned to logits [1, n, vocabulary]; or what `load` gave.
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_k: draw from the likeliest tokens alone, this many.

    Raises:
        ValueError: for an empty prompt.
    """
    if not prompt:
        raise ValueError("Expected a prompt of at least one token, got none.")
    device = model.device if isinstance(model, Served) else next(model.parameters()).device
    seen, unread, cache, read = [*prompt], [*prompt][-context:], model.new_cache(), 0
    for _ in range(count):
        if read + len(unread) > context:
            unread, cache, read = seen[-max(context // 2, 1) :], model.new_cache(), 0
        logits = model(torch.tensor([unread], device=device), cache)[0, -1]
        read += len(unread)
        unread = [draw(logits.float(), temperature, top_k)]
        seen += unread
        yield unread[0]


def draw(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> int:
    """Draw a token from logits [vocabulary] by torch's generator."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((logits / temperature).softmax(dim=0).cpu(), 1))


class OneToken(nn.Module):
    """A language model that reads one token, and takes and returns keys and values as one tensor; see `Past`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, kept: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        past = Past(kept)
        logits = self.model(token, past)
        return logits, past.extended()


class Served:
    """A language model that `load` read from a file, to be called as the model was: with tokens [1, n] and a cache."""

    device = torch.device("cpu")

    def __init__(self, program: Program):
        self.program = program
        self.shape = program.description["inputs"][0]["shape"][1:]

    def new_cache(self) -> Past:
        """Return an empty cache."""
        return Past(torch.zeros(1, *self.shape))

    def __call__(self, tokens: Tensor, cache: Past) -> Tensor:
        logits = []
        for token in tokens.split(1, dim=1):
            result, cache.kept = self.program(cache.kept, token)
            logits.append(result)
        return torch.cat(logits, dim=1)


@torch.no_grad()
def save(model: nn.Module, path: str | os.PathLike) -> int:
    """Write a language model with its cache of keys and values into one file that `load` serves; return its bytes.

    `model` is gpt or llama of this package, or a converted one. The file is one of `sparselearning.sparse.save`.

    Raises:
        ValueError, OSError: as `sparselearning.sparse.save`.
    """
    cache = Cache()
    token = torch.zeros(1, 1, dtype=torch.int64)
    training = model.training
    model.eval()(token, cache)
    kept = torch.stack([torch.stack(cache.kept[block]) for block in sorted(cache.kept)]).permute(4, 0, 1, 2, 3, 5)
    try:
        return sparse.save(OneToken(model), path, (torch.randn(5, *kept.shape[1:]).to(kept), token))
    finally:
        model.train(training)


def load(path: str | os.PathLike) -> Served:
    """Return the language model that `save` wrote, for `generate`. It needs none of the model's code.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: as `sparselearning.sparse.load`.
    """
    program = sparse.load(path)
    if [len(each["shape"]) for each in program.description["inputs"]] != [6, 2]:
        raise ValueError(
            f"Expected a language model in {path}, got a model of {program.expected()}. Use sparselearning.sparse.load."
        )
    return Served(program)
