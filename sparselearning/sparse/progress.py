"""A line on stderr that says how far something is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WIDTH = 24
Show = Callable[[float, str], None]  # told the share that is done, in [0, 1], and what comes now


@contextmanager
def progress_line(label: str, shown: bool | None) -> Iterator[Show]:
    """Yield a function that draws a bar on stderr.

    shown: whether it does; None for where stderr is a terminal.
    """
    stream = sys.stderr
    if not (stream is not None and stream.isatty() if shown is None else shown):
        yield lambda share, what: None
        return

    def show(share: float, what: str) -> None:
        bar = "#" * round(WIDTH * share)
        stream.write(f"\r{label} [{bar:<{WIDTH}}] {share:4.0%} {what:<24}")
        stream.flush()

    try:
        yield show
    finally:
        stream.write("\n")
