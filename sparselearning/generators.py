"""The states of the random-number generators: as plain data for a checkpoint, and back again."""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = 624  # of 32 bits, in the state of a Mersenne twister


def random_state() -> dict[str, Any]:
    """Return the state of the generators of torch (CPU and GPUs), numpy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to the states that `random_state` returned; those of GPUs only if their number is the same.

    Raises:
        RuntimeError: if a state is none; no generator has changed then.
    """
    for_torch = checked("torch", _for_torch, state)
    for_gpus = checked("cuda", _for_gpus, state)
    for_numpy = checked("numpy", _for_numpy, state)
    for_python = checked("python", _for_python, state)
    torch.set_rng_state(for_torch)
    if for_gpus:
        torch.cuda.set_rng_state_all(for_gpus)
    np.random.set_state(for_numpy)  # noqa: NPY002
    random.setstate(for_python)


def checked(name: str, take: Any, state: Any) -> Any:
    """Return the state of one generator, after another generator has taken it."""
    try:
        return take(state[name])
    except Exception as error:  # each library raises types of its own
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise RuntimeError(
            f"The state of the random-number generator of {name} is damaged ({said}). Load another checkpoint."
        ) from error


def _for_torch(state):
    state = _bytes(state)
    torch.Generator().set_state(state)
    return state


def _for_gpus(states):
    if not isinstance(states, list | tuple):
        raise TypeError(f"expected a list, got a {type(states).__name__}")
    states = [_bytes(state) for state in states]
    if len(states) != torch.cuda.device_count():
        return []
    for device, state in enumerate(states):
        torch.Generator(f"cuda:{device}").set_state(state)
    return states


def _bytes(state):
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        raise TypeError("expected a vector of bytes")
    return state.cpu()


def _for_numpy(state):
    kind, keys, position, has_gauss, gauss = state
    if kind != "MT19937" or not isinstance(keys, Tensor) or keys.dtype != torch.int64 or tuple(keys.shape) != (WORDS,):
        raise TypeError(f"expected {WORDS} int64 words of an MT19937")
    if bool((keys < 0).any()) or bool((keys >= 2**32).any()):
        raise ValueError("expected words of 32 bits")
    _check_position(position)
    if type(has_gauss) is not int or has_gauss not in (0, 1) or not math.isfinite(gauss):
        raise ValueError("expected 0 or 1 and a finite number")
    taken = (kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss)
    np.random.RandomState().set_state(taken)
    return taken


def _for_python(state):
    version, internal, gauss = state
    words = tuple(internal)
    if version != 3 or len(words) != WORDS + 1 or not all(type(word) is int and 0 <= word < 2**32 for word in words):
        raise ValueError(f"expected version 3 and {WORDS} words of 32 bits with a position")
    _check_position(words[-1])
    if gauss is not None and not (isinstance(gauss, float) and math.isfinite(gauss)):
        raise ValueError("expected a finite number or None")
    random.Random().setstate((version, words, gauss))
    return version, words, gauss


def _check_position(position):
    """Refuse a position outside the words, from which numpy would read."""
    if type(position) is not int or not 0 <= position <= WORDS:
        raise ValueError(f"expected a position from 0 to {WORDS}")
