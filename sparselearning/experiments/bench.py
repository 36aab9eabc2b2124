"""Time the layers of a model, dense and on sparse kernels, beside an estimate of what their zeros could save.

    with LayerBench(model) as bench, torch.no_grad():
        for images, _ in batches:
            model(images)
    _, report = sparse.convert(model, images)
    print(bench.table(report))

Estimated times are those of release 1.0: the dense time, as if work on zeros were free.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.sparse import Report


@dataclass(frozen=True)
class LayerTime:
    """One layer in one forward pass of the model: seconds, and shares in [0, 1].

    A channel of a linear layer is one of its input features. A channel is dead in the weight if every weight
    that reads it is zero, and dead in the input of one sample if it is zero at every position.
    """

    name: str
    seconds: float
    weight_density: float
    input_density: float
    dead_weight_channels: float
    dead_input_channels: float
    sparse_seconds: float = math.nan  # measured; nan where the layer stays dense

    @property
    def channel_sparse_seconds(self) -> float:
        """Estimate without dead channels: t (1 - dead in the weight) (1 - dead in the input)."""
        return self.seconds * (1 - self.dead_weight_channels) * (1 - self.dead_input_channels)

    @property
    def zero_free_seconds(self) -> float:
        """Estimate without any zero: t * input density * weight density."""
        return self.seconds * self.input_density * self.weight_density


# Columns of the table. Of TIMES it gives the totals too, and the speed-up over the first.
SHARES: dict[str, Callable[[LayerTime], float]] = {
    "weight\ndensity": lambda layer: layer.weight_density,
    "input\ndensity": lambda layer: layer.input_density,
    "dead channels\nof weight": lambda layer: layer.dead_weight_channels,
    "dead channels\nof input": lambda layer: layer.dead_input_channels,
}
TIMES: dict[str, Callable[[LayerTime], float]] = {
    "dense\nmeasured ms": lambda layer: layer.seconds,
    "sparse\nmeasured ms": lambda layer: layer.sparse_seconds,
    "channel-sparse\nestimated ms": lambda layer: layer.channel_sparse_seconds,
    "fully sparse\nestimated ms": lambda layer: layer.zero_free_seconds,
}


LEGEND = """\
Times are per forward pass. Measured sparse: on the kernels of sparselearning.sparse, with the normalisation and ReLU that
are folded into them; - where a layer stays dense, which then counts as it is. ESTIMATES, as if work on zeros were free:
  channel-sparse = dense x (1 - dead channels of weight) x (1 - dead channels of input)
  fully sparse = dense x input density x weight density"""


class LayerBench:
    """Context manager that times every Conv2d and Linear of `model` while the model runs inside it.

    The time of a layer is the median over its calls times its calls per forward pass, so that neither warm-up
    nor a smaller last batch counts; run several batches. A compiled model runs eagerly meanwhile. Works on the CPU
    and on CUDA devices; there it waits for the device only when the results are read.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self._started: dict[str, tuple[Any, Tensor, Tensor]] = {}
        self._calls: defaultdict[str, list[_Call]] = defaultdict(list)
        self._passes = 0
        self._undo = ExitStack()

    def __enter__(self) -> "LayerBench":
        self._undo.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled model has no layers to time
        hooks = [self._model.register_forward_hook(self._count_pass)]
        for name, layer in self._layers.items():
            hooks.append(layer.register_forward_pre_hook(partial(self._start, name), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(self._end, name)))
        for hook in hooks:
            self._undo.callback(hook.remove)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._undo.close()

    def layers(self, report: Report | None = None) -> list[LayerTime]:
        """Return the layers that ran, in the order of their first call, with their weights as they are now.

        `report` is what `sparse.convert` says of the same model and a batch of the same size.

        Raises:
            RuntimeError: if no forward pass of the model was seen.
        """
        if not self._calls or not self._passes:
            expected = "Expected a model with Conv2d or Linear layers to run inside the `with` block of LayerBench"
            raise RuntimeError(f"{expected}, saw no such run. Call model(images) there.")
        replaced = [layer for layer in report.layers if layer.replaced] if report else []
        sparse = {layer.name: layer.sparse_ms / 1e3 for layer in replaced}
        return [self._summary(name, calls, sparse.get(name, math.nan)) for name, calls in self._calls.items()]

    def table(self, report: Report | None = None) -> str:
        """Return the layers as text, one a line, then the total times and what they gain over the dense one.

        With a `report` of `sparse.convert`, its measured sparse times too, and those of the whole model last.

        Raises:
            RuntimeError: if no forward pass of the model was seen.
        """
        from tabulate import tabulate

        layers = self.layers(report)
        totals = [sum(_first_number(seconds(layer), layer.seconds) for layer in layers) for seconds in TIMES.values()]
        rows: list[list[Any]] = []
        for layer in layers:
            shares = [f"{share(layer):.4f}" for share in SHARES.values()]
            rows.append([layer.name, *shares, *(_milliseconds(seconds(layer)) for seconds in TIMES.values())])
        blank = [""] * len(SHARES)
        rows.append(["total", *blank, *map(_milliseconds, totals)])
        rows.append(["speed-up", *blank, *(_speed_up(totals[0], total) for total in totals)])
        headers = ["layer", *SHARES, *TIMES]
        text = tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1))
        return f"{text}\n{LEGEND}{_whole_model(report)}"

    def _summary(self, name: str, calls: "list[_Call]", sparse_seconds: float) -> LayerTime:
        layer, calls_per_pass = self._layers[name], len(calls) / self._passes
        return LayerTime(
            name=name or type(layer).__name__,
            seconds=median(call.seconds() for call in calls) * calls_per_pass,
            weight_density=float(_density(layer.weight)),
            input_density=float(torch.stack([call.input_density for call in calls]).mean()),
            dead_weight_channels=_dead_weight_channels(layer),
            dead_input_channels=float(torch.stack([call.dead_input_channels for call in calls]).mean()),
            sparse_seconds=sparse_seconds * calls_per_pass,
        )

    def _count_pass(self, *_arguments: object) -> None:
        self._passes += 1

    def _start(self, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        alive = (x != 0) if isinstance(layer, nn.Linear) else (x != 0).flatten(-2).any(-1)
        statistics = _density(x), 1 - _density(alive)
        self._started[name] = (_now(x.device), *statistics)

    def _end(self, name: str, _layer: nn.Module, _args: tuple, output: Tensor) -> None:
        end = _now(output.device)
        start, *statistics = self._started.pop(name)
        self._calls[name].append(_Call(start, end, *statistics))


@dataclass(frozen=True)
class _Call:
    """One call of one layer, between two instants of `_now`; the statistics wait on the device."""

    start: Any
    end: Any
    input_density: Tensor
    dead_input_channels: Tensor

    def seconds(self) -> float:
        if isinstance(self.start, float):
            return self.end - self.start
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def _now(device: torch.device) -> "float | torch.cuda.Event":
    if device.type == "cpu":
        return time.perf_counter()
    if device.type != "cuda":
        raise ValueError(f"LayerBench measures on cpu and cuda devices, got {device}. Move the model and images.")
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _density(x: Tensor) -> Tensor:
    return x.count_nonzero() / x.numel()


def _dead_weight_channels(layer: nn.Conv2d | nn.Linear) -> float:
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    outputs, inputs = layer.weight.shape[:2]  # a grouped convolution has in_channels / groups inputs per group
    alive = (layer.weight != 0).reshape(groups, outputs // groups, inputs, -1).any(3).any(1)
    return 1 - float(_density(alive))


def _milliseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.4f}"


def _first_number(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _whole_model(report: Report | None) -> str:
    if report is None or math.isnan(report.dense_ms):
        return ""
    threads, gain = torch.get_num_threads(), report.dense_ms / report.converted_ms
    times = f"dense {report.dense_ms:.4f} ms, sparse {report.converted_ms:.4f} ms, {gain:.2f}x"
    return f"\nWhole model on one batch, the two taking turns, {threads} threads: {times}"


def _speed_up(dense: float, other: float) -> str:
    return f"{dense / other:.2f}x" if other else "-"
