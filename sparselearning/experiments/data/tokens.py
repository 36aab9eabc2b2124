"""Text as numbers: bytes, characters, or the tokens of a tokenizer; and windows of them to train and evaluate on."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselearning import checkpoint
from sparselearning.experiments.data.files import DataError, printable, reason
from sparselearning.experiments.data.text import Content, Text, read_text

LARGE = 1 << 24  # bytes of a text whose tokens are kept in a file


class Bytes:
    """Each byte is a token, of 256."""

    vocabulary = 256
    digest = b"bytes"

    def encode(self, content: Content) -> np.ndarray:
        """Return the tokens of a text."""
        return np.frombuffer(content, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become a replacement character."""
        return bytes(tokens).decode(errors="replace")


class Characters:
    """Each character of a text is a token, in the order of Unicode; a text in UTF-8."""

    digest = b"characters"

    def __init__(self, text: Text):
        self.points = np.unique(_points(text.name, text.content))
        self.vocabulary = len(self.points)

    def encode(self, content: Content) -> np.ndarray:
        """Return the tokens of a text.

        Raises:
            DataError: for a character that the vocabulary does not have.
        """
        points = _points("The text", content)
        tokens = np.searchsorted(self.points, points)
        known = self.points[np.minimum(tokens, self.vocabulary - 1)] == points
        if not known.all():
            raise DataError(f"The character {chr(points[~known][0])!r} is not in the text that the model reads.")
        return tokens.astype(_dtype_for(self.vocabulary))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return "".join(chr(self.points[token]) for token in tokens)


class Tokenizer:
    """The tokens of a file of the package `tokenizers`; a text in UTF-8.

    Raises:
        DataError: if the package or the file is missing, or the file is none of a tokenizer.
    """

    def __init__(self, path: str):
        try:
            from tokenizers import Tokenizer as OfFile  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise DataError(f"--tokens {path} needs the package tokenizers: pip install tokenizers.") from None
        try:
            self.digest = Path(path).read_bytes()
            self.inner: Any = OfFile.from_str(self.digest.decode())
        except Exception as error:  # tokenizers raises plain exceptions
            raise DataError(f"{printable(path)} cannot be read as a tokenizer's file: {reason(error)}.") from error
        self.vocabulary: int = self.inner.get_vocab_size()

    def encode(self, content: Content) -> np.ndarray:
        """Return the tokens of a text."""
        ids = self.inner.encode(_decode("The text", content), add_special_tokens=False).ids
        return np.array(ids, _dtype_for(self.vocabulary))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self.inner.decode([*tokens])


@dataclass
class Corpus:
    """The tokens of a text, which are read where they are used if the text is large.

    `digest` identifies text and tokens. `bytes_per_token` is of the held-out part.
    """

    train: np.ndarray
    valid: np.ndarray
    tokens: Any
    digest: str
    bytes_per_token: float


def load(source: str, tokens: str, folder: Path, context: int) -> Corpus:
    """Return the tokens of the text that --data means, in the sense of --tokens: bytes, characters, or a file's.

    Those of a large text are written once to `folder`/tokens, under a name made of the hash of the text.

    Raises:
        DataError: if the text cannot be read, is not UTF-8 where it has to be, or is too short for the context.
        OSError: if the file of tokens cannot be written.
    """
    text = read_text(source, folder)
    kind = Bytes() if tokens == "bytes" else Characters(text) if tokens == "characters" else Tokenizer(tokens)
    hashed = hashlib.sha256(text.content)
    hashed.update(kind.digest + b"\0" + str(text.cut).encode())
    digest = hashed.hexdigest()
    parts = {"train": slice(0, text.cut), "valid": slice(text.cut, None)}
    train, valid = (_encoded(kind, text, part, folder / "tokens" / f"{digest}-{name}") for name, part in parts.items())
    for name, part in (("training", train), ("held-out", valid)):
        if len(part) <= context:
            raise DataError(
                f"{printable(source)} is too short: its {name} part has {len(part):,} tokens, and a context of "
                f"{context} needs at least {context + 1}. Take a longer text or a smaller --context."
            )
    return Corpus(train, valid, kind, digest, (len(text.content) - text.cut) / len(valid))


def _encoded(kind, text, part, path):
    """Return the tokens of a part of a text: from the file `path` if the text is large, which is written if missing."""
    if len(text.content) < LARGE:
        return kind.encode(text.content[part])
    dtype = _dtype_for(kind.vocabulary)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = kind.encode(text.content[part]).astype(dtype)
        checkpoint.write_atomically(path, lambda file: file.write(tokens.data))
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _dtype_for(vocabulary):
    return np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.uint32


def _points(name, content):
    """Return the characters of a text as numbers."""
    return np.frombuffer(_decode(name, content).encode("utf-32-le"), np.uint32)


def _decode(name, content):
    try:
        return bytes(content).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{printable(name)} is not UTF-8 at byte {error.start:,}: {error.reason}. Take --tokens bytes for it."
        ) from None


def batches(
    tokens: np.ndarray, context: int, steps: range, seed: int, batch_size: int, parts: int = 1, share: tuple = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the windows of each step in `parts`, as (tokens, next tokens), both int64 [windows, context].

    The windows of a step depend on the seed and its number alone: a run that goes on reads what it would have read, on
    any number of processes.

    Args:
        steps: their numbers, from 0.
        batch_size: the windows of a step, of all parts and processes.
        share: this process and the number of processes, among which the windows are divided.
    """
    rank, processes = share
    for step in steps:
        random = np.random.default_rng([seed, step])
        starts = random.integers(len(tokens) - context, size=batch_size).reshape(parts, processes, -1)
        for part in starts[:, rank]:
            yield windows(tokens, part, context)


def windows(tokens: np.ndarray, starts: Sequence[int] | np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Return the windows that begin at these places, and the tokens that follow each of theirs."""
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]


def windows_to_evaluate(
    tokens: np.ndarray, context: int, most: int, batch_size: int, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of at most `most` windows, the same in every evaluation, evenly over the tokens.

    Windows do not overlap. All processes get as many batches; what fills them up has the targets -1.
    """
    rank, processes = share
    there = (len(tokens) - 1) // context
    count = min(most, there)
    starts = [context * (there * i // count) for i in range(count)]
    whole = batch_size * processes
    for first in range(0, count, whole):
        mine = starts[first : first + whole][rank::processes]
        inputs, targets = windows(tokens, mine or [0], context)
        yield inputs, targets if mine else torch.full_like(targets, -1)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return a loss in bits per byte of text, which models with other tokens have, too.

    >>> bits_per_byte(math.log(2), 1.0), bits_per_byte(math.log(256), 4.0)
    (1.0, 2.0)
    """
    return nats_per_token / math.log(2) / bytes_per_token
