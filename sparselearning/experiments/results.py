"""Test results of runs: find and read them, group what differs only by seed, and summarise.

Reads run folders (args.json, metrics.jsonl) and log files (*.log) of release 1.0.
"""

import ast
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparselearning.methods import PARTS

# Arguments that do not change what a run computes, and those that matter to sparse runs only.
IRRELEVANT = {
    *("seed", "iters", "verbose", "log_interval", "max_threads", "save_model", "save_features", "bench"),
    *("run_dir", "data_dir", "resume", "start_epoch", "device", "no_cuda"),
}
SPARSE_ONLY = {"method", "layer_density", "dense_layers", "pattern", *PARTS}
OLD_NAMES = {"death": "prune", "death_rate": "prune_rate", "iterations": "iters"}
TEST_LINE = re.compile(r"Test evaluation: Average loss: (\S+), Accuracy: (\d+)/(\d+)")


class ResultsError(Exception):
    """What is wrong with a folder, a file or a request, in one line."""


@dataclass(frozen=True)
class Run:
    """One run: its arguments, where they were found, and its test accuracy and loss (None: unfinished).

    `sample` is what makes a result count once: the seed, or the line in a log file of release 1.0, where --iters
    repeated runs under one seed.
    """

    path: Path
    args: dict[str, Any]
    sample: Any = None
    accuracy: float | None = None
    loss: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has a test result."""
        return self.accuracy is not None


def find(folder: Path, recursive: bool = False) -> Iterator[Path]:
    """Yield the run folders and log files in `folder`, with `recursive` also those below, or `folder` itself.

    Raises:
        ResultsError: if it does not exist.
    """
    if not folder.exists():
        raise ResultsError(f"There is no folder {folder}. Train with main.py first, or pass --folder-path FOLDER.")
    if folder.is_file() or _is_run(folder):
        yield folder
        return
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".log"))
        runs = [name for name in sorted(folders) if _is_run(Path(parent, name))]
        yield from (Path(parent, name) for name in runs)
        folders[:] = sorted(set(folders) - set(runs)) if recursive else []


def read(path: Path) -> list[Run]:
    """Return the run of a run folder, or the runs of a log file.

    Raises:
        ResultsError: if it cannot be understood.
    """
    try:
        return read_log(path) if path.is_file() else [read_run_folder(path)]
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, OSError) as error:
        raise ResultsError(f"{path} cannot be read as a run ({type(error).__name__}: {error}).") from None


def read_run_folder(path: Path) -> Run:
    """Return the run that left args.json and metrics.jsonl in the folder `path`."""
    args = today(json.loads((path / "args.json").read_text()))
    metrics = path / "metrics.jsonl"
    records = map(json.loads, metrics.read_text().splitlines() if metrics.is_file() else [])
    result = next((record for record in records if "test_accuracy" in record), {})
    return Run(path, args, args.get("seed", path), result.get("test_accuracy"), result.get("test_loss"))


def read_log(path: Path) -> list[Run]:
    """Return the runs of a log file of release 1.0.

    A line `Namespace(...)` starts a command of `iters` runs, each of which ends with a line `Test evaluation`.
    """
    runs: list[Run] = []
    args, missing = {}, 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if "Namespace(" in line:
            runs += [Run(path, args)] * missing
            args = today(parse_namespace(line))
            missing = args.get("iters", 1)
        elif test := TEST_LINE.match(line):
            if not args:
                raise ValueError(f"line {number} has a test result before any line Namespace(...)")
            loss, correct, total = test.groups()
            runs.append(Run(path, args, (path, number), int(correct) / int(total), float(loss)))
            missing = max(0, missing - 1)
    return runs + [Run(path, args)] * missing


def parse_namespace(line: str) -> dict[str, Any]:
    """Return the arguments in a line that ends with the text of an `argparse.Namespace`.

    >>> parse_namespace("12:00:01 Namespace(lr=0.1, model='lenet5')")
    {'lr': 0.1, 'model': 'lenet5'}
    """
    call = ast.parse(line[line.index("Namespace(") :].strip(), mode="eval").body
    if not isinstance(call, ast.Call):
        raise ValueError("expected Namespace(name=value, ...)")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}


def today(args: dict[str, Any]) -> dict[str, Any]:
    """Return `args` of any release under the names of this one; a dense run has density 1."""
    args = {OLD_NAMES.get(name, name): value for name, value in args.items()}
    if "sparse" in args:
        args.setdefault("dense", not args.pop("sparse"))
    return args | {"density": 1.0} if args.get("dense") else args


def configuration(run: Run) -> dict[str, Any]:
    """Return the arguments that a run shares with those that differ only by seed."""
    left_out = IRRELEVANT | {"dense"} | (SPARSE_ONLY if run.args.get("dense") else set())
    return {key: value for key, value in sorted(run.args.items()) if key not in left_out}


def group(runs: Iterable[Run], across_folders: bool = False) -> list[tuple[dict[str, Any], list[Run]]]:
    """Return configurations and their runs, the newest run of each seed.

    Without `across_folders` the folder that holds a run is part of its configuration.
    """
    groups: dict[str, tuple[dict[str, Any], dict[Any, Run]]] = {}
    for run in sorted(runs, key=lambda run: run.path.stat().st_mtime):
        folder = {} if across_folders else {"folder": str(run.path.parent)}
        config = folder | configuration(run)
        _, samples = groups.setdefault(json.dumps(config, sort_keys=True, default=str), (config, {}))
        samples[run.sample] = run
    return [(config, list(samples.values())) for config, samples in groups.values()]


def summarise(runs: list[Run]) -> dict[str, dict[str, float | None]]:
    """Return the statistics of test accuracy, error and loss over finished runs."""
    accuracies, losses = ([getattr(run, key) for run in runs] for key in ("accuracy", "loss"))
    errors = [1 - accuracy for accuracy in accuracies]
    return {name: statistics(v) for name, v in [("accuracy", accuracies), ("error", errors), ("loss", losses)]}


def statistics(values: list[float]) -> dict[str, float | None]:
    """Return mean, median, standard error, and low and high end of Student's 95% interval for the mean.

    One value has neither standard error nor interval: None.
    """
    mean, median = float(np.mean(values)), float(np.median(values))
    if len(values) == 1:
        return {"mean": mean, "median": median, "standard_error": None, "low": None, "high": None}
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = student_t(0.975, len(values) - 1) * error
    return {"mean": mean, "median": median, "standard_error": error, "low": mean - half, "high": mean + half}


def student_t(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution with `freedom` >= 1 degrees, for probabilities in [0.5, 1).

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1).

    >>> round(student_t(0.975, 2), 4)
    4.3027
    """
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * probability - 1, area / area[-1], angle)))


def _is_run(path: Path) -> bool:
    return (path / "args.json").is_file()
