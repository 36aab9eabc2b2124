"""Text from a language model, token by token, with a cache of keys and values."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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
        model: maps tokens [1, n] and what its `new_cache` returned to logits [1, n, vocabulary].
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_k: draw from the likeliest tokens alone, this many.

    Raises:
        ValueError: for an empty prompt.
    """
    if not prompt:
        raise ValueError("Expected a prompt of at least one token, got none.")
    device = next(model.parameters()).device
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
