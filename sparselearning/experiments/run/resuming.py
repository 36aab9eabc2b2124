"""Checkpoints of a run, at the end of its epochs and inside them, and how it resumes from one.

A checkpoint inside an epoch holds the progress of that epoch: the steps done, their losses, and the order of the
images. A run that resumes from it computes what the uninterrupted run would have; on a CPU it is the same to the bit.
"""

import argparse
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sparselearning import checkpoint
from sparselearning.core import Masking
from sparselearning.experiments.run import folder as run_folder
from sparselearning.experiments.run.arguments import goes_on
from sparselearning.experiments.run.folder import RunFolder
from sparselearning.experiments.run.stopping import Stopped, StopRequests
from sparselearning.experiments.run.together import on_first
from sparselearning.experiments.run.training import Progress, check_weights
from sparselearning.loading import (
    MOST_STEPS,
    check_entries,
    check_number,
    check_tensor,
    check_whole,
    describe,
    refuse,
)
from sparselearning.processes import distributed
from sparselearning.processes.sharded import Whole, is_sharded, reshard, shard_of, unsharded

Batch = TypeVar("Batch")
Found = tuple[Path, dict[str, Any]]  # a checkpoint, and what it holds

logger = logging.getLogger(__name__)


def find(args: argparse.Namespace) -> Found | None:
    """Return the checkpoint that `args.resume` means, or None for a new run; `args.resume` becomes its path, or None.

    A folder means the newest good checkpoint in it; 'auto' means that of the run folder of these arguments. All
    processes get the same.

    Raises:
        FileNotFoundError, CheckpointError: if there is none, or none that can be read; with 'auto' a new run begins.
        CheckpointError: if the run is to go on, and the checkpoint is of a run with other arguments.
    """
    if not args.resume:
        args.resume = None
        return None
    state = None

    def find_on_first():
        nonlocal state
        if (found := _find(args)) is None:
            return None
        path, state = found
        if goes_on(args):
            run_folder.check_same_run(path, state.get("args", {}), args)
        return path

    path = on_first(find_on_first)
    others_read = state is None and path is not None and goes_on(args)
    args.resume = path and str(path)
    if path is None:
        return None
    return path, checkpoint.read(path) if others_read else state or {}


def weights_to_evaluate(args: argparse.Namespace) -> Path:
    """Return the file whose weights --evaluate is about: the checkpoint that --resume means, or --pretrained-weights.

    Raises:
        FileNotFoundError, CheckpointError: as `find`; also where 'auto' finds no good checkpoint.
    """
    found = find(args)
    return found[0] if found else Path(args.pretrained_weights)


def _find(args):
    if args.resume != "auto":
        path = Path(args.resume)
        if path.is_dir():
            return checkpoint.read_newest(path / "checkpoint.pt")
        return path, checkpoint.read(path) if goes_on(args) else {}  # other programs' weights may be in it
    folder = run_folder.place(args)
    try:
        return checkpoint.read_newest(folder / "checkpoint.pt")
    except (FileNotFoundError, checkpoint.CheckpointError) as error:
        if vars(args).get("evaluate"):
            raise
        if isinstance(error, FileNotFoundError):
            logger.info("There is no checkpoint in %s: a new run begins.", folder)
        else:
            logger.warning("%s There is no good one in %s: a new run begins.", error, folder)
    return None


def parts_of_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    precision: Any,
    masking: Masking | None,
    sharded: bool = False,
) -> dict[str, Any]:
    """Return what the checkpoints of a run hold, by the names it has there; None is left out.

    Args:
        optimizer: torch's, not the one that Apex puts around it.
        sharded: whether the weights are sharded (FSDP2); their checkpoint holds whole ones.
    """
    parts = dict(model=model, optimizer=optimizer, mask=masking)
    parts = {name: Whole(part) if sharded else part for name, part in parts.items() if part is not None}
    return {**parts, "scheduler": scheduler, "precision": precision}


class Checkpoints:
    """Writes the checkpoints of a run: after an epoch, every `args.checkpoint_every` steps, and when the run stops.

    The last `args.keep` checkpoints stay. All processes call the same methods; the first one writes.

    Args:
        parts: what `checkpoint.save` takes; see `parts_of_checkpoint`.
        model: the model in `parts`. A stop during an evaluation keeps its gradients, which growth may read after it.
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
        """Write a checkpoint if one is due.

        Raises:
            Stopped: if the run was asked to stop, after a checkpoint was written.
        """
        number = self.stop.requested()
        if progress.steps == self.steps_per_epoch:
            return  # the checkpoint of the whole epoch comes soon
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
        """Write the checkpoint of a whole epoch, and copies of it under the names `copies`.

        Raises:
            Stopped: if the run was asked to stop.
        """
        self._save(epoch)
        self.copy(self.folder.checkpoint, copies)
        if number := self.stop.requested():
            self._stop(number, f"after epoch {epoch}")

    def copy(self, source: Path, copies: Iterable[str]) -> None:
        """Copy the checkpoint `source` to names in the folder. A run that goes on makes copies that were not made."""
        for name in copies if self.folder.writes else ():
            with self.folder.writing(name), source.open("rb") as whole:
                checkpoint.write_atomically(self.folder.path / name, partial(shutil.copyfileobj, whole))

    def _stop(self, number, where):
        raise Stopped(number, f"{where}; --resume {self.folder.path} goes on from there")

    def _save(self, epoch, progress=None, gradients=None):
        here: dict[str, Any] = {"random": checkpoint.random_state()}
        if progress is not None:  # inside an epoch each process has statistics of BatchNorm of its own
            here["buffers"] = [buffer.cpu() for buffer in self.model.buffers()]
        if isinstance(masking := self.parts.get("mask"), Masking):
            masking.held.share()
        others = distributed.gather(here)[1:]
        if not self.folder.writes:
            for part in self.parts.values():
                part.state_dict()  # sends this process's shards to the first one
            return
        with self.folder.writing("The checkpoint"):
            checkpoint.save(
                self.folder.checkpoint, keep=self.args.keep, **self.parts, epoch=epoch, progress=progress,
                gradients=gradients, processes=others, metrics=self.folder.metrics, args=vars(self.args),
            )  # fmt: skip


def take(
    args: argparse.Namespace, found: Found | None, parts: dict[str, Any], model: nn.Module, images: int | None = None
) -> tuple[int, Progress | None, list[dict[str, Any]] | None]:
    """Load the checkpoint that `find` found, if the run goes on.

    Each process gets its own random-number generators back, if there are as many processes as before. `images` is the
    number of training images, where the run shuffles them itself.

    Returns:
        The epoch to train next, its progress if it had begun, and the records of the epochs before it, which
        `RunFolder` takes; (args.start_epoch, None, None) for a new run.

    Raises:
        CheckpointError: as `checkpoint.restore`, and for entries of the run that are none.
    """
    if found is None or not goes_on(args):
        return args.start_epoch, None, None
    saved = checkpoint.restore(*found, **parts)
    try:
        check_run(saved, model, images)
        take_gradients(saved.get("gradients") or {}, model)
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"{found[0]}: {error}") from error
    others = saved.get("processes", [])
    rank = distributed.rank()
    if rank and len(others) == distributed.processes() - 1:
        mine = others[rank - 1]
        checkpoint.set_random_state(mine["random"])
        for buffer, value in zip(model.buffers(), mine.get("buffers", []), strict=False):
            buffer.copy_(value)
    progress = saved.get("progress")
    return saved["epoch"] + 1, Progress(**progress) if progress else None, saved["metrics"]


def take_gradients(saved: Any, model: nn.Module) -> None:
    """Give the weights the gradients of a run that was stopped in its evaluation; a dict by name, or an empty one.

    Raises:
        RuntimeError: for entries that are no gradients of this model; nothing is changed then.
    """
    weights = dict(model.named_parameters())
    for name, gradient in check_entries("'gradients'", saved, (), tuple(weights)).items():
        if gradient is not None:
            shape = getattr(weights[name], "active", weights[name]).shape  # on sparse kernels that of the values
            check_tensor(f"'gradients'[{name!r}]", gradient, shape, "floating")
    for name, gradient in saved.items():
        if gradient is not None:
            weight = weights[name]
            weight.grad = shard_of(gradient, weight) if is_sharded(weight) else gradient.to(weight.device)


def check_run(saved: dict[str, Any], model: nn.Module, images: int | None) -> None:
    """Check what a checkpoint holds of a run beside its parts.

    Raises:
        RuntimeError: naming the entry, what was expected and what came.
    """
    check_whole("'epoch'", saved.get("epoch"), 0, MOST_STEPS)
    metrics = saved.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(record, dict) for record in metrics):
        refuse("'metrics'", "a list of dicts", describe(metrics))
    if saved.get("progress") is not None:
        check_progress(saved["progress"], images)
    others, buffers = saved.get("processes", []), [buffer.shape for buffer in model.buffers()]
    if not isinstance(others, list):
        refuse("'processes'", "a list of dicts", describe(others))
    for i, other in enumerate(others):
        entry = f"'processes'[{i}]"
        kept = check_entries(entry, other, ("random",), ("buffers",)).get("buffers", [])
        if not isinstance(kept, list) or len(kept) not in (0, len(buffers)):
            refuse(f"{entry}['buffers']", f"a list of {len(buffers)} tensors", describe(kept))
        for buffer, shape in zip(kept, buffers, strict=False):
            check_tensor(f"{entry}['buffers']", buffer, shape)


def check_progress(progress: Any, images: int | None) -> None:
    """Check the progress of an epoch in a checkpoint; an order of images has each image once."""
    check_entries("'progress'", progress, ("steps", "loss"), ("seconds", "order"))
    check_whole("'progress'['steps']", progress["steps"], 0, MOST_STEPS)
    check_number("'progress'['loss']", progress["loss"], -math.inf, math.inf)
    check_number("'progress'['seconds']", progress.get("seconds", 0.0), 0, math.inf)
    order = progress.get("order")
    if images is not None and order is not None:
        check_tensor("'progress'['order']", order, (images,), torch.int64)
        if not torch.equal(order.sort().values, torch.arange(images)):
            refuse("'progress'['order']", f"each of {images} images once", "others")
