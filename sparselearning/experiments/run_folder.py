"""The folder a run leaves: args.json, log.txt, metrics.jsonl, checkpoints and pictures."""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from sparselearning import checkpoint
from sparselearning.distributed import rank

# They change where a run is kept or what it shows, not what it computes.
NOT_IN_THE_NAME = {
    *("bench", "data_dir", "iters", "log_interval", "max_threads", "resume", "run_dir"),
    *("save_features", "save_model", "verbose"),
    *("checkpoint_every", "keep"),
    *("accumulate", "bench_iterations", "bench_warmup", "evaluate", "fsdp", "gather_checkpoints"),
    *("print_freq", "workers"),
}
# They may differ when a run goes on: it becomes longer, or moves to another machine; its masks are there already.
MAY_CHANGE = {*NOT_IN_THE_NAME, "compile", "device", "epochs", "sparse_init", "start_epoch", "test_batch_size"}
FORMATS = {
    "train_loss": ".4f",
    "valid_loss": ".4f",
    "valid_accuracy": ".4f",
    "valid_accuracy_5": ".4f",
    "lr": ".3g",
    "prune_rate": ".4f",
    "exploration_rate": ".4f",
    "density": ".4f",
    "inference_flops": ".3f",
    "training_flops": ".3f",
    "images_per_second": ".1f",
    "seconds": ".1f",
}


class RunFolder:
    """A run's folder, named after its arguments: <data>-<model>-<density>-<seed>-<hash>.

    The hash is over all arguments that change the result, so that a run finds its folder again. An interrupted run
    goes on with its `metrics`, in its folder if that is where `args.resume` lies; any other finds no results there, for
    those that an earlier run of the same arguments left are kept beside, as <name>.1, <name>.2, ... Of several
    processes the first one alone writes.

    Raises:
        OSError: if the folder cannot be written.
    """

    def __init__(self, args: argparse.Namespace, metrics: list[dict[str, Any]] | None = None):
        self.path = place(args)
        self.metrics = list(metrics or [])
        self.writes = rank() == 0
        if not self.writes:
            return
        goes_on_here = metrics is not None and Path(args.resume).resolve().parent == self.path.resolve()
        text = json.dumps(vars(args), indent=2, sort_keys=True) + "\n"
        try:
            if self._holds_results() and not goes_on_here:
                beside = (self.path.with_name(f"{self.path.name}.{i}") for i in count(1))
                self.path.rename(next(path for path in beside if not path.exists()))
            self.path.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_scratch(self.path)
            checkpoint.write_atomically(self.path / "args.json", lambda file: file.write(text.encode()))
            self._write_metrics()
        except OSError as error:
            hint = "Choose another place with --run-dir."
            raise OSError(f"The run folder {self.path} cannot be written: {error}. {hint}") from error

    @property
    def checkpoint(self) -> Path:
        """Where the run's checkpoint is."""
        return self.path / "checkpoint.pt"

    def add(self, **record: Any) -> None:
        """Append a record to metrics.jsonl."""
        self.metrics.append(record)
        self._write_metrics()

    def line(self) -> str:
        """Return the last epoch as a line of text."""
        return "  ".join(
            f"{name.replace('_', ' ')} {value:{FORMATS.get(name, '')}}"
            for name, value in self.metrics[-1].items()
            if not isinstance(value, dict)
        )

    def kept(self) -> str:
        """Return which checkpoint is left when the run fails."""
        if self.checkpoint.exists():
            return f"The last checkpoint is kept in {self.checkpoint}."
        return "There is no checkpoint yet."

    def _holds_results(self):
        """Tell whether a run got as far as a checkpoint, or a line of metrics."""
        metrics = self.path / "metrics.jsonl"
        return bool([*self.path.glob("checkpoint*.pt")]) or (metrics.is_file() and metrics.stat().st_size > 0)

    def _write_metrics(self):
        if not self.writes:
            return
        lines = "".join(json.dumps(record) + "\n" for record in self.metrics)
        checkpoint.write_atomically(self.path / "metrics.jsonl", lambda file: file.write(lines.encode()))

    @contextmanager
    def log(self) -> Iterator[None]:
        """Copy what is logged to log.txt."""
        handler = _LogFile(self.path / "log.txt") if self.writes else logging.NullHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            handler.close()


class _LogFile(logging.FileHandler):
    """Lets an error of the disk end the run, where logging would print a traceback per line and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def place(args: argparse.Namespace) -> Path:
    """Return the path of the folder of a run with these arguments."""
    return Path(args.run_dir) / _name(args)


def arguments_of(path: str | Path) -> dict[str, Any]:
    """Return the arguments that a run began with, from its folder or one of its checkpoints.

    Raises:
        FileNotFoundError, CheckpointError: if there is none, or none that can be read.
    """
    path = Path(path)
    if (path / "args.json").is_file():
        with suppress(ValueError):
            return json.loads((path / "args.json").read_text())
    if path.is_dir():
        return checkpoint.read_newest(path / "checkpoint.pt")[1].get("args", {})
    return checkpoint.read(path).get("args", {})


def check_same_run(path: str | Path, saved: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Check that the run in checkpoint `path`, which began with the arguments `saved`, goes on with the same.

    Raises:
        CheckpointError: if one differs that decides what is computed; names each.
    """
    here = vars(args)
    different = [name for name in sorted(saved.keys() & here) if name not in MAY_CHANGE and saved[name] != here[name]]
    if different:
        there, now = (" ".join(f"{name}={run[name]}" for name in different) for run in (saved, here))
        raise checkpoint.CheckpointError(f"{path} is of a run with {there}, not {now}. Go on with its arguments.")


def _name(args):
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_IN_THE_NAME}
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    density = 1.0 if args.dense else args.density
    model = args.model.replace(":", "-").replace("/", "-")
    return f"{args.data}-{model}-{density:g}-{args.seed}-{digest}"
