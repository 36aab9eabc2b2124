"""What the first of several processes does for all: they get what it returns, or the error that it raises."""

from collections.abc import Callable
from typing import TypeVar

from sparselearning.processes import distributed

Value = TypeVar("Value")


def on_first(function: Callable[[], Value]) -> Value:
    """Call a function on the first process alone; return its value, or raise its error, on all processes.

    Without this the others would wait for a process that has ended, and then report that it is lost.
    """
    if not distributed.in_process_group():
        return function()
    if distributed.rank():
        value, error = distributed.from_first(None)
        if error is not None:
            error.said_by_first = True
            raise error
        return value
    try:
        value = function()
    except Exception as error:
        distributed.from_first((None, error))
        raise
    return distributed.from_first((value, None))[0]


def said_by_first(error: BaseException) -> bool:
    """Tell whether this process got the error from the first one, which reports it."""
    return getattr(error, "said_by_first", False)
