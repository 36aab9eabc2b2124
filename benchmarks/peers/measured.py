"""One row of the benchmark of engines, measured: torch in this process, the peers in theirs, in turns with ours."""

import copy
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import few_rows
import numpy as np
import torch
from peers import rows
from peers.processes import PEERS, Process, Skipped
from peers.server import turn
from torch import Tensor, nn

from sparselearning.sparse import convert, load, save

OURS, CONVERTED = "ours", "converted"
TORCH = ("eager", "eager channels_last", "compiled", "compiled channels_last", "CSR")
KINDS = (CONVERTED, *TORCH, *PEERS)
NO_AVX2 = {"ONNX Runtime": "it cannot be held to AVX2", "ONNX Runtime int8": "it cannot be held to AVX2"}


def torch_kind(kind: str, model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a call of the model in one of torch's ways.

    Raises:
        Skipped: for one that the model does not have.
    """
    if kind == "CSR":
        if x.dim() != 2:
            raise Skipped("torch's CSR product is for linear layers")
        warnings.filterwarnings("ignore", message="Sparse CSR")
        compressed = few_rows.Compressed(model)  # pyright: ignore[reportArgumentType]
        return lambda: compressed(x)
    if kind.endswith("channels_last"):
        if x.dim() != 4:
            raise Skipped("rows have no channels")
        model, x = copy.deepcopy(model), x.to(memory_format=torch.channels_last)
        nn.Module.to(model, memory_format=torch.channels_last)
    call = torch.compile(model) if kind.startswith("compiled") else model
    return lambda: call(x)


def pair(ours: Callable[[float], float], other: Callable[[float], float], rounds: int, least: float) -> dict:
    """Return the median milliseconds of both and the median of their ratios; they take turns in every round."""
    turns = [(ours(least), other(least)) for _ in range(rounds)]
    return dict(
        ms=1e3 * statistics.median(theirs for _, theirs in turns),
        ours_ms=1e3 * statistics.median(own for own, _ in turns),
        ratio=statistics.median(theirs / own for own, theirs in turns),
    )


def error_of(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """Return the largest difference of outputs, and the largest output."""
    return dict(largest_difference=float(np.abs(expected - got).max()), largest_output=float(np.abs(expected).max()))


def served(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a converted model as another process would serve it: saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.sparse")
        return load(Path(folder) / "model.sparse")


@torch.no_grad()
def measure(job: Mapping) -> dict:
    """Return the results of a row by kind: times and errors, or why a kind was skipped.

    job: row (the fields of a Row), threads, isa, rounds, least (seconds of a turn), kinds, pythons (environment:
    (Python, what is wrong)).
    """
    row, threads, rounds, least = rows.Row(*job["row"]), job["threads"], job["rounds"], job["least"]
    torch.set_num_threads(threads)
    model, x = rows.network(row)
    expected = model(x).numpy()
    start = time.perf_counter()
    fast, report = convert(model, x, progress=False)
    converting = time.perf_counter() - start
    serve = served(fast)
    ours = partial(turn, lambda: serve(x))
    result: dict = {OURS: dict(convert_seconds=converting, sparse_layers=sum(r.replaced for r in report.layers))}
    result[OURS] |= error_of(expected, serve(x).numpy())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for kind in job["kinds"]:
            logging.info("%s, %d threads, %s: %s", row.name, threads, job["isa"], kind)
            try:
                if kind == CONVERTED:
                    result[kind] = error_of(expected, fast(x).numpy()) | pair(
                        ours, partial(turn, lambda: fast(x)), rounds, least
                    )
                    continue
                if kind in TORCH:
                    call = torch_kind(kind, model, x)
                    found = error_of(expected, call().numpy())
                    result[kind] = found | pair(ours, partial(turn, call), rounds, least)
                    continue
                if job["isa"] == "avx2" and kind in NO_AVX2:
                    raise Skipped(NO_AVX2[kind])
                environment, engine = PEERS[kind]
                python, wrong = job["pythons"][environment]
                if wrong:
                    raise Skipped(wrong)
                if not path.exists():
                    rows.export(model, x, path)
                with Process(python, engine, path, x.numpy(), threads) as process:
                    found = error_of(expected, process.output()) | dict(version=process.version)
                    result[kind] = found | pair(ours, process.turn, rounds, least)
            except Skipped as why:
                result[kind] = dict(skipped=str(why))
            except Exception as error:  # torch.compile without a compiler, for example
                lines = str(error).strip().splitlines() or [""]
                result[kind] = dict(skipped=f"{type(error).__name__}: {lines[0][:200]}")
            torch.compiler.reset()
    times = [found["ours_ms"] for found in result.values() if "ours_ms" in found]
    result[OURS]["ms"] = statistics.median(times) if times else 1e3 * statistics.median(ours(least) for _ in range(3))
    return dict(result=result, load_average=os.getloadavg(), torch_isa=torch.backends.cpu.get_cpu_capability())


def answer(job: str) -> None:
    """Measure what the JSON text says, and print the result as the last line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print("\n" + json.dumps(measure(json.loads(job))))
