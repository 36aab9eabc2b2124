"""How long the layers of a model take where they are: on their real inputs, among the layers around them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from sparselearning.sparse.trees import Arguments, copied

MOST_ROUNDS = 100


@dataclass
class Times:
    """What one model took, in milliseconds: each round as a whole, and the best round of each layer.

    Layers are named by their place in model.modules(), in the order in which the model calls them first. `own` is a
    layer's call alone. `span` lasts from its call to that of the next layer, so the spans of all layers are the time of
    the model, and a layer's span has what its output makes slower before the next one.
    """

    whole: list[float] = field(default_factory=list)
    own: dict[int, float] = field(default_factory=dict)
    span: dict[int, float] = field(default_factory=dict)

    def add(self, whole: float, own: dict[int, float], span: dict[int, float]) -> None:
        """Take the times of one more round."""
        self.whole.append(whole)
        for best, new in ((self.own, own), (self.span, span)):
            for place, spent in new.items():
                best[place] = min(spent, best.get(place, spent))


def time_in_turns(
    models: Sequence[nn.Module],
    places: Sequence[int],
    arguments: Arguments,
    seconds: float,
    least: int = 2,
    show: Callable[[float], None] = lambda share: None,
) -> list[Times]:
    """Return the times of models that take turns, so that what disturbs one disturbs all.

    They run for `seconds`, but at least `least` rounds. `places` are those of the layers, equal in all models. The
    models keep what a run changes in them, so pass copies. `show` is told the share that is done.
    """
    args, kwargs = copied(arguments)
    times = [Times() for _ in models]
    watches = [Watch(model, places) for model in models]
    start = time.perf_counter()
    try:
        with torch.no_grad():
            for done in range(MOST_ROUNDS):
                spent = time.perf_counter() - start
                if done >= least and spent * (done + 1) > seconds * done:  # another round would end too late
                    break
                for each, (watch, record) in enumerate(zip(watches, times, strict=True)):
                    record.add(*watch.run(args, kwargs))
                    passes = done + (each + 1) / len(models)
                    show(min(1.0, passes / least, (time.perf_counter() - start) / max(seconds, 1e-9)))
    finally:
        for watch in watches:
            watch.end()
    return times


class Watch:
    """Notes when some layers of a model begin and end."""

    def __init__(self, model: nn.Module, places: Sequence[int]):
        self.model = model
        self.stamps: list[tuple[int, bool, float]] = []  # place, whether the call begins, when
        modules = list(model.modules())
        self.hooks = []
        for place in places:
            note = partial(self.note, place)
            self.hooks.append(modules[place].register_forward_pre_hook(lambda *_, note=note: note(True)))
            self.hooks.append(modules[place].register_forward_hook(lambda *_, note=note: note(False)))

    def note(self, place: int, begins: bool) -> None:
        self.stamps.append((place, begins, time.perf_counter()))

    def run(self, args: tuple, kwargs: dict) -> tuple[float, dict[int, float], dict[int, float]]:
        """Run the model once; return the milliseconds of the run, and own and span of each layer."""
        self.stamps.clear()
        start = time.perf_counter()
        self.model(*args, **kwargs)
        end = time.perf_counter()
        own: dict[int, float] = defaultdict(float)
        span: dict[int, float] = defaultdict(float)
        begun: dict[int, float] = {}
        last: tuple[int, float] | None = None
        for place, begins, now in self.stamps:
            if not begins:
                own[place] += (now - begun[place]) * 1e3
                continue
            if last is not None:
                span[last[0]] += (now - last[1]) * 1e3
            begun[place] = now
            last = place, now
        if last is not None:
            span[last[0]] += (end - last[1]) * 1e3
        return (end - start) * 1e3, dict(own), dict(span)

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
