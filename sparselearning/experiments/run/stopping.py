"""How a run stops on SIGTERM and its kin: at once, or after a step that all its processes have done."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sparselearning.processes import distributed

# A terminal sends SIGINT (Ctrl-C) and SIGHUP; schedulers send SIGTERM, or what a job asks for, such as SIGUSR1.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]  # Windows lacks some


class Stopped(KeyboardInterrupt):
    """The run stops because of the signal `number`; `hint` says how to go on with it."""

    def __init__(self, number: int, hint: str = "the same command with --resume auto goes on from the last checkpoint"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {hint}")
        self.number = number


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` on the SIGNALS while the context lasts; in other threads than the main one do nothing.

    Python lets only the main thread handle signals. A SIGHUP that nohup lets the process ignore stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = [number for number in SIGNALS if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_at_once(number: int, frame: Any) -> NoReturn:
    """Stop at once, wherever the program is; a handler of signals."""
    raise Stopped(number)


def end_stopped(program: str, stop: KeyboardInterrupt) -> NoReturn:
    """Say in one line how to go on with the run, and exit with 128 + the signal's number, as shells expect it."""
    if not isinstance(stop, Stopped):
        stop = Stopped(signal.SIGINT)
    if distributed.rank() == 0:
        print(f"{program}: {stop}", file=sys.stderr)
    sys.exit(128 + stop.number)


class StopRequests:
    """Notes the SIGNALS, so that a run stops after a step, and all its processes after the same step.

        with StopRequests() as stop:
            ...
            if stop.requested(): ...

    Where one process trains alone, a second signal stops it at once.
    """

    def __init__(self):
        self.noted = 0
        self._travelling: tuple[Any, torch.Tensor] | None = None

    def __enter__(self):
        self._handling = handled(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, *error):
        self._handling.__exit__(*error)

    def _note(self, number, frame):
        # Under torchrun a signal may come twice: the terminal sends it to all processes, and torchrun passes it on.
        if self.noted and not distributed.in_process_group():
            raise Stopped(number)
        self.noted = number

    def requested(self) -> int:
        """Return the number of the signal to stop for, or 0.

        Call it on all processes after every step. The answer is the same everywhere. With several processes it lags one
        call, so that the exchange overlaps with computing.
        """
        if not distributed.in_process_group():
            return self.noted
        answer = 0
        if self._travelling is not None:
            work, number = self._travelling
            work.wait()
            answer = int(number)
        number = torch.tensor(self.noted)
        self._travelling = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True), number
        return answer
