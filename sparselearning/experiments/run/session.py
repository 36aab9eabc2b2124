"""What the scripts do alike around their epoch loops: start, log, name errors, record an epoch, end."""

import argparse
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from sparselearning.checkpoint import CheckpointError
from sparselearning.core import Masking
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.report import plots
from sparselearning.experiments.run import stopping
from sparselearning.experiments.run.costs import describe
from sparselearning.experiments.run.folder import RunFolder
from sparselearning.experiments.run.lock import Locked
from sparselearning.experiments.run.together import said_by_first
from sparselearning.experiments.run.training import NotFinite, seed_generators
from sparselearning.flags import holds_active_alone
from sparselearning.flops import Flops, relative_flops
from sparselearning.functions import FunctionError
from sparselearning.native.allocator import keep_freed_memory, lay_large_blocks_apart
from sparselearning.parser import fail
from sparselearning.processes import distributed

USER_ERRORS = (DataError, CheckpointError, Locked, NotFinite, FunctionError, OSError, ValueError)

logger = logging.getLogger(__name__)


def main(program: str, parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], Any]) -> None:
    """Run a script: one line and exit status 2 for a user's mistake, 1 for a lost process, 128 + n for signal n.

    Of several processes the first one alone logs, unless another meets an error.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    # The schedule counts steps of the data. It also steps where fp16 overflowed, perhaps before the optimizer has.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    try:
        with logging_redirect_tqdm(), stopping.handled(stopping.stop_at_once), distributed.noticing_losses():
            run(parse())
    except USER_ERRORS as error:
        if said_by_first(error):
            sys.exit(2)
        fail(program, error)
    except distributed.ProcessError as error:
        fail(program, error, status=1)
    except KeyboardInterrupt as stop:
        stopping.end_stopped(program, stop)
    finally:
        distributed.stop()


def start(args: argparse.Namespace) -> torch.device:
    """Join the other processes, limit threads, seed the generators; return the device to train on."""
    device = distributed.start(args.device)
    if device.type == "cpu":
        keep_freed_memory()
        if holds_active_alone(args):
            lay_large_blocks_apart()  # until the first step: a dense model is not to be kept
    torch.set_num_threads(min(args.max_threads, _most_threads()))
    seed_generators(args.seed)
    return device


def _most_threads():
    """Return what OMP_NUM_THREADS allows, or one thread a core; under torchrun this process's share of the cores.

    torchrun sets OMP_NUM_THREADS=1 where nobody has set it, however many cores there are.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return torch.get_num_threads() if here == 1 else max((os.cpu_count() or 1) // here, 1)


def log_head(
    folder: RunFolder,
    args: argparse.Namespace,
    masking: Masking | None,
    flops: Flops,
    steps: int,
    example: str = "an image",
) -> None:
    """Log what is trained: the arguments, the kind of fp16, the density, the FLOPs at `steps` steps per epoch."""
    logger.info("%s: %s", folder.path, " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    if args.fp16:
        logger.info("fp16 by %s", "Apex" if args.amp == "apex" else "torch.amp, for Apex is not installed")
    if masking is not None:
        active, inactive = masking.total_nonzero, masking.total_zero
        logger.info("density %.4f: %d weights active, %d not", masking.density, active, inactive)
        if holds_active_alone(args):
            held = Counter(map(masking.held.describe, masking.layers))
            logger.info("layers: %s", ", ".join(f"{count} {kind}" for kind, count in held.items()))
    logger.info(describe(flops, relative_flops(flops, masking, steps), example))


@contextmanager
def naming_errors(epoch: int, folder: RunFolder) -> Iterator[None]:
    """Let the errors of an epoch say which epoch it was, and which checkpoint is left.

    Raises:
        NotFinite, ValueError: in place of those that training, evaluation and an update of the masks raise.
    """
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"Epoch {epoch}: {error}. {folder.kept()} Try a lower --lr.") from None
    except ValueError as error:
        raise ValueError(f"Epoch {epoch}: {error} {folder.kept()}") from None


def record_of(
    epoch: int,
    steps_per_epoch: int,
    results: Mapping[str, float],
    lr: float,
    flops: Flops,
    masking: Masking | None,
    dense_weights: int,
) -> dict[str, Any]:
    """Return the record of an epoch for metrics.jsonl: steps, results, learning rate, what is active, what it costs.

    Call it before the masks move: it describes the network that the epoch trained.

    Args:
        results: losses and accuracies by name.
        dense_weights: what counts as active where there are no masks.
    """
    record = dict(epoch=epoch, steps=epoch * steps_per_epoch, **results, lr=lr, density=1.0)
    record |= dict(active_weights=dense_weights, **relative_flops(flops, masking, steps_per_epoch))
    if masking is not None:
        record |= dict(density=masking.density, active_weights=masking.total_nonzero)
        record |= dict(density_per_layer=masking.densities)
        record |= dict(prune_rate=masking.prune_rate, exploration_rate=masking.exploration_rate)
        if masking.held.bytes_per_step is not None:
            record |= dict(bytes_per_step=masking.held.bytes_per_step)
    return record


def check_agreement(masking: Masking | None) -> None:
    """Check that all processes end with the same masks.

    Raises:
        ProcessError: on every process, if they do not.
    """
    if masking is not None and distributed.in_process_group():
        distributed.check_agreement(masking.layers)


def draw_pictures(
    folder: RunFolder, masking: Masking | None, draw_curves: Callable[[Any, Any], None] | None = None
) -> None:
    """Write curves.png, and density.png where there are masks; of several processes the first one does.

    `draw_curves` draws the former from metrics to a path (default: `plots.plot_curves`).
    """
    if not folder.writes:
        return
    with folder.writing("curves.png"):
        (draw_curves or plots.plot_curves)(folder.metrics, folder.path / "curves.png")
    if masking is not None:
        with folder.writing("density.png"):
            plots.plot_density(folder.metrics, folder.path / "density.png")
