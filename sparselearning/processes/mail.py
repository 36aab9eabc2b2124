"""Small messages between processes that wait for each other for a limited time."""

import io
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

FRAME = 4096  # bytes that are always sent; what is longer takes a second message
GRACE = 5.0  # seconds that the others wait longer than the first, so that it can say who is late


class Late(RuntimeError):
    """A process did not come in time, or is gone: `rank`."""

    def __init__(self, rank: int):
        super().__init__(f"process {rank}")
        self.rank = rank


def exchange(facts: Any, ranks: Sequence[int], group: Any, patience: float) -> list[Any]:
    """Return the facts of all processes, in the order of `ranks`. The first collects and sends.

    Args:
        facts: numbers, texts, tensors, and lists and dicts of them.
        ranks: the processes.
        group: their Gloo group.
        patience: seconds to wait for each.

    Raises:
        Late: on the first process naming the other; on the others naming the first, which knows.
    """
    first, *others = ranks
    waiting = first
    try:
        if dist.get_rank() != first:
            _send(facts, first, group, patience + GRACE)
            return _receive(first, group, patience + GRACE)
        collected = [facts]
        for waiting in others:
            collected.append(_receive(waiting, group, patience))
        for waiting in others:
            _send(collected, waiting, group, patience)
    except RuntimeError as error:
        raise Late(waiting) from error
    return collected


def _send(value: Any, rank: int, group: Any, seconds: float) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    data = file.getvalue()
    frame = torch.zeros(FRAME, dtype=torch.uint8)
    whole = torch.frombuffer(bytearray(len(data).to_bytes(8, "big") + data), dtype=torch.uint8)
    frame[: min(len(whole), FRAME)] = whole[:FRAME]
    _wait(dist.isend(frame, rank, group=group), seconds)
    if len(whole) > FRAME:
        _wait(dist.isend(whole[FRAME:].contiguous(), rank, group=group), seconds)


def _receive(rank: int, group: Any, seconds: float) -> Any:
    frame = torch.empty(FRAME, dtype=torch.uint8)
    _wait(dist.irecv(frame, rank, group=group), seconds)
    length = int.from_bytes(bytes(frame[:8].tolist()), "big")
    if (rest := length + 8 - FRAME) > 0:
        more = torch.empty(rest, dtype=torch.uint8)
        _wait(dist.irecv(more, rank, group=group), seconds)
        frame = torch.cat([frame, more])
    return torch.load(io.BytesIO(frame[8 : 8 + length].numpy().tobytes()), weights_only=True)


def _wait(work: Any, seconds: float) -> None:
    if work is not None:
        work.wait(timedelta(seconds=seconds))
