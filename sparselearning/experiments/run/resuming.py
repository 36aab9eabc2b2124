"""Stop and go on: signals, and the checkpoints of a run between its epochs and inside them.

A checkpoint inside an epoch holds its progress: the steps done, their losses, and the order of the images. A run that
goes on from it computes what the uninterrupted one would have, to the bit on a CPU.
"""

import argparse
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from sparselearning import checkpoint
from sparselearning.experiments.run import folder as run_folder
from sparselearning.experiments.run.folder import RunFolder
from sparselearning.experiments.run.training import Progress, check_weights
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded, reshard, shard_of, unsharded

Batch = TypeVar("Batch")

logger = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """The signal `number` asked the run to stop; `hint` says how it goes on."""

    def __init__(self, number: int, hint: str = "the same command with --resume auto goes on from the last checkpoint"):
        super().__init__(f"stopped by {signal.Signals(number).name}; {hint}")
        self.number = number


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` on SIGTERM and SIGINT; Python allows that in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_at_once(number: int, frame: Any) -> NoReturn:
    """Stop where the program is; a handler of signals."""
    raise Stopped(number)


def end_stopped(program: str, stop: KeyboardInterrupt) -> NoReturn:
    """Say in one line how the run goes on, and exit with 128 + the signal's number, as a shell and schedulers do."""
    if not isinstance(stop, Stopped):
        stop = Stopped(signal.SIGINT)
    if distributed.rank() == 0:
        print(f"{program}: {stop}", file=sys.stderr)
    sys.exit(128 + stop.number)


def find(args: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `args.resume` means, and what it holds; None for a new run.

    A folder means the newest good checkpoint in it; 'auto' the run folder of these arguments. All processes get
    the same.

    Raises:
        FileNotFoundError, CheckpointError: if there is none, or none that can be read; with 'auto' a new run begins.
    """
    if not args.resume:
        return None
    if distributed.rank():
        path = distributed.from_first(None)
        return None if path is None else (path, checkpoint.read(path))
    found = _find(args)
    distributed.from_first(found and found[0])
    return found


def _find(args):
    if args.resume != "auto":
        path = Path(args.resume)
        return checkpoint.read_newest(path / "checkpoint.pt") if path.is_dir() else (path, checkpoint.read(path))
    folder = run_folder.place(args)
    try:
        return checkpoint.read_newest(folder / "checkpoint.pt")
    except FileNotFoundError:
        logger.info("There is no checkpoint in %s: a new run begins.", folder)
    except checkpoint.CheckpointError as error:
        logger.warning("%s There is no good one in %s: a new run begins.", error, folder)
    return None


class StopRequests:
    """Notes SIGTERM and SIGINT, so that a run ends between two steps, all its processes between the same two.

    with StopRequests() as stop:
        ...
        if stop.requested(): ...

    Of a single process a second signal ends at once.
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
        # torchrun passes a signal on that the terminal has sent to all.
        if self.noted and not distributed.in_process_group():
            raise Stopped(number)
        self.noted = number

    def requested(self) -> int:
        """Return the number of the signal to stop for, or 0.

        All processes call it equally often and get the same answer: what one of them had noted at the call
        before, for the answer travels while a step is computed.
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


class Checkpoints:
    """Writes the checkpoints of a run: at the end of an epoch, every `args.checkpoint_every` steps, and when it stops.

    The last `args.keep` stay. Of several processes the first writes; all call the same methods.

    Args:
        parts: what `checkpoint.save` takes.
        model: the model in `parts`, whose gradients a stop during evaluation has to keep, for growth may read them.
        steps_per_epoch: number of steps.
    """

    def __init__(
        self,
        folder: RunFolder,
        parts: dict[str, Any],
        model: nn.Module,
        args: argparse.Namespace,
        stop: StopRequests,
        steps_per_epoch: int,
    ):
        self.folder = folder
        self.parts = parts
        self.model = model
        self.args = args
        self.stop = stop
        self.steps_per_epoch = steps_per_epoch

    def after_step(self, epoch: int, progress: Progress) -> None:
        """Write a checkpoint if it is time.

        Raises:
            Stopped: if the run was asked to stop, after a checkpoint was written.
        """
        number = self.stop.requested()
        if progress.steps == self.steps_per_epoch:
            return  # the checkpoint of the whole epoch is near
        step = (epoch - 1) * self.steps_per_epoch + progress.steps
        every = self.args.checkpoint_every
        if number or (every and step % every == 0):
            check_weights(self.model, progress.steps)
            self._save(epoch - 1, progress.state_dict())
        if number:
            self._stop(number, f"in epoch {epoch} after step {progress.steps} of {self.steps_per_epoch}")

    def watch(self, batches: Iterable[Batch], epoch: int, progress: Progress) -> Iterator[Batch]:
        """Yield the batches of the evaluation after `epoch`.

        Raises:
            Stopped: if the run was asked to stop, after a checkpoint was written.
        """
        for batch in batches:
            if number := self.stop.requested():
                reshard([self.model])
                gradients = {name: weight.grad for name, weight in self.model.named_parameters()}
                self._save(epoch - 1, progress.state_dict(), gradients=unsharded(gradients))
                self._stop(number, f"in the evaluation after epoch {epoch}")
            yield batch

    def after_epoch(self, epoch: int, copies: Iterable[str] = ()) -> None:
        """Write the checkpoint of a whole epoch, and the same under the names `copies`.

        Raises:
            Stopped: if the run was asked to stop.
        """
        self._save(epoch)
        if self.folder.writes:
            for name in copies:
                with self.folder.checkpoint.open("rb") as whole:
                    checkpoint.write_atomically(self.folder.path / name, partial(shutil.copyfileobj, whole))
        if number := self.stop.requested():
            self._stop(number, f"after epoch {epoch}")

    def _stop(self, number, where):
        raise Stopped(number, f"{where}; --resume {self.folder.path} goes on from there")

    def _save(self, epoch, progress=None, gradients=None):
        here: dict[str, Any] = {"random": checkpoint.random_state()}
        if progress is not None:  # inside an epoch each process has statistics of BatchNorm of its own
            here["buffers"] = [buffer.cpu() for buffer in self.model.buffers()]
        others = distributed.gather(here)[1:]
        if not self.folder.writes:
            for part in self.parts.values():
                part.state_dict()  # hands the first process its shards
            return
        try:
            checkpoint.save(
                self.folder.checkpoint, keep=self.args.keep, **self.parts, epoch=epoch, progress=progress,
                gradients=gradients, processes=others, metrics=self.folder.metrics, args=vars(self.args),
            )  # fmt: skip
        except OSError as error:
            hint = f"Make room, and go on with --resume {self.folder.path}."
            raise OSError(f"The checkpoint cannot be written: {error}. {self.folder.kept()} {hint}") from error


def take(path: Path, state: dict[str, Any], parts: dict[str, Any], model: nn.Module) -> tuple[int, Progress | None]:
    """Load a checkpoint of `Checkpoints`; return the epoch to go on with, and its progress if it had begun.

    Each process gets its own generators back, if there are as many as there were.

    Raises:
        CheckpointError: as `checkpoint.restore`.
    """
    saved = checkpoint.restore(path, state, **parts)
    others = saved.get("processes", [])
    rank = distributed.rank()
    if rank and len(others) == distributed.processes() - 1:
        mine = others[rank - 1]
        checkpoint.set_random_state(mine["random"])
        for buffer, value in zip(model.buffers(), mine.get("buffers", []), strict=False):
            buffer.copy_(value)
    for name, weight in model.named_parameters():
        if (gradient := (saved.get("gradients") or {}).get(name)) is not None:
            weight.grad = shard_of(gradient, weight) if is_sharded(weight) else gradient.to(weight.device)
    progress = saved.get("progress")
    return saved["epoch"] + 1, progress and Progress(**progress)
