"""Shared by the benchmarks: alternating rounds, peak memory, a count of synchronisations, a report."""

import argparse
import ctypes
import json
import logging
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# As main.py does, before torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparselearning import models
from sparselearning.models.resnet import resnet50

RESULTS = Path(__file__).parent / "results"
MODELS = ("lenet300-100", "vgg-d", "wrn-16-8", "resnet50")


def parse(description: str | None, rounds: int, **more: tuple[Any, str]) -> argparse.Namespace:
    """Return the arguments that every benchmark takes, and those of `more`, given as name=(default, meaning).

    `rounds` is the default of --rounds; with --quick it is 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: small models, few rounds")
    parser.add_argument("--rounds", type=int, help=f"measurements of each kind (default: {rounds})")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", help="JSON file to write (default: results/<benchmark>-<device>.json)")
    for name, (default, meaning) in more.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{meaning} (default: %(default)s)"
        )
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else rounds)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return args


def build(name: str, device: str | torch.device = "cpu") -> torch.nn.Module:
    """Return a newly initialised network: resnet50, or a key of models.MODELS."""
    return (resnet50() if name == "resnet50" else models.build(name)).to(device)


def input_shape(name: str) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of the images of a network that `build` makes."""
    return (3, 224, 224) if name == "resnet50" else models.INPUT_SHAPES[name]


def alternate(
    kinds: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: int = 1,
    device: str = "cpu",
    prepare: Callable[[], Any] = lambda: None,
    least: float = 0.0,
) -> dict[str, list[float]]:
    """Return the seconds per call of each kind, one number per round; the kinds take turns, so that load affects all.

    A turn is `calls` calls, and more until `least` seconds have passed. `prepare` runs unmeasured before every turn,
    and every kind is called once, unmeasured, before the first round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for call in kinds.values():
        prepare()
        call()
    for _ in range(rounds):
        for name, call in kinds.items():
            prepare()
            wait(device)
            started, done, spent = time.perf_counter(), 0, 0.0
            while done < calls or spent < least:
                call()
                done += 1
                if done >= calls:
                    wait(device)
                    spent = time.perf_counter() - started
            seconds[name].append(spent / done)
    return seconds


def wait(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median, the quartiles and the best."""
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return dict(median=median, low=low, high=high, best=min(seconds))


def ratio(seconds: list[float], others: list[float]) -> float:
    """Return the median over rounds of the ratio of one kind's time to the other's in the same round."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def show(label: str, seconds: Mapping[str, list[float]]) -> None:
    """Log medians and quartiles in milliseconds."""
    for kind, values in seconds.items():
        s = {name: 1e3 * value for name, value in summary(values).items()}
        logging.info("%-32s %-28s %9.3f ms  (%.3f to %.3f)", label, kind, s["median"], s["low"], s["high"])


def log_ratios(label: str, row: Mapping[str, Any]) -> None:
    """Log the ratios of a row, whose names have the form "this / that"."""
    for name, value in row.items():
        if " / " in name:
            logging.info("%-32s %s = %.3f", label, name, value)


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Return the peak number of bytes that a call uses in addition to those in use before it.

    Raises:
        OSError: for a CPU, if the operating system is not Linux, which alone tells the peak.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def save(args: argparse.Namespace, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows with hardware, versions and load to results/<benchmark>-<device>.json."""
    path = Path(args.output) if args.output else RESULTS / f"{benchmark}-{args.device.partition(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "data_dir", "other")}
    report = dict(benchmark=benchmark, settings=settings, machine=machine(args.device), rows=rows)
    path.write_text(json.dumps(report, indent=1) + "\n")
    logging.info("Wrote %s", path)


def machine(device: str) -> dict[str, Any]:
    """Return the hardware, the versions and the commit that numbers were measured with."""
    found = dict(
        processor=_processor(),
        cores=os.cpu_count(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        load_average=os.getloadavg()[0],
        omp_wait_policy=os.environ["OMP_WAIT_POLICY"],
        gomp_spincount=os.environ.get("GOMP_SPINCOUNT"),
        torch=torch.__version__,
        numpy=np.__version__,
        python=platform.python_version(),
        commit=commit(),
    )
    if device.startswith("cuda"):
        found |= dict(gpu=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
    return found


def _processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """Return the commit that is checked out, with "-dirty" if files other than results were changed."""
    here = Path(__file__).parent
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}")
    return (_git(here, "describe", "--always") or "unknown") + ("-dirty" if changed else "")


def _git(folder, *arguments):
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    ).stdout.strip()


class Synchronisations(TorchFunctionMode):
    """Counts how often the host would wait for a GPU, on a machine that has none.

    Inside the context, tensors report that they are on a GPU, so that code takes its path for devices, while everything
    stays on the CPU. Every read of a value, or of a size that depends on values, counts.
    """

    READS = (
        *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.masked_select),
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.unique, Tensor.bincount),
        *(torch.nonzero, torch.masked_select, torch.unique, torch.bincount, torch.is_nonzero, torch.equal),
    )
    INDEXING = (Tensor.__getitem__, Tensor.__setitem__)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return torch.device("cuda")
        by_mask = function in self.INDEXING and _holds_bool(args[1])
        self.count += function in self.READS or by_mask
        return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


def _on_cpu(value):
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _holds_bool(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)
