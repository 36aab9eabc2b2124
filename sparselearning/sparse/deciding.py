"""Which layers of a model become sparse: decided where they are, in the whole model.

A layer alone says little. In the model its input comes in another memory order, its weight is no longer in the caches,
and the next layer reads what order it leaves. So whole models are timed: dense ones and one with all layers sparse say
which layers are in doubt, and each of these is then tried in its other forms, in the model that is best so far.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from sparselearning.sparse import in_place
from sparselearning.sparse.changes import Applied, Change, Choice
from sparselearning.sparse.in_place import Times
from sparselearning.sparse.progress import Show
from sparselearning.sparse.report import LayerReport
from sparselearning.sparse.trees import Arguments, fresh

SURELY_SPARSE = 0.5  # of its dense time, both in place: such a layer is not tried dense
SURELY_DENSE = 3.0  # and one that takes so much more is not tried sparse
MARGIN = 0.05  # of a layer's time: what a sparse form must gain, so that noise puts in none
WHOLE_MARGIN = 0.02  # of the model's
SHARES = 0.3, 0.5, 0.2  # of the seconds: estimates, tries, the comparison of whole models

SPARSE, DENSE, CHANNELS_LAST = range(3)
Forms = dict["Candidate", int]


@dataclass(eq=False)
class Candidate:
    """A layer that can be had in several forms: the changes that make them, by form.

    `place` is the layer's in model.modules(). A large layer without zeros has no sparse form. `keeps` says that the
    dense form keeps the memory order of sparse layers.
    """

    place: int
    entry: LayerReport
    changes: dict[int, Change]
    keeps: bool = False

    def in_form(self, form: int) -> int:
        """Return the form, or what comes next to it among those that the layer has."""
        return form if form in self.changes else DENSE


@dataclass
class Decision:
    """The changes to make, and the milliseconds of the dense model and of the changed one."""

    forms: Forms | None  # None for the model as it was
    changes: list[Change]
    dense_ms: float
    converted_ms: float


class Trial:
    """A model whose layers can be timed in any of their forms.

    extras: changes that belong to every model with a sparse layer: what keeps the memory order between them.
    """

    def __init__(self, model: nn.Module, candidates: list[Candidate], extras: list[Change], arguments: Arguments):
        self.model, self.candidates, self.extras, self.arguments = model, candidates, extras, arguments

    def uniform(self, form: int) -> Forms:
        return {candidate: candidate.in_form(form) for candidate in self.candidates}

    def changes(self, forms: Forms) -> list[Change]:
        """Return the changes that give the layers these forms."""
        own = [candidate.changes[form] for candidate, form in forms.items()]
        return own + (self.extras if SPARSE in forms.values() else [])

    def copy_in(self, forms: Forms | None) -> nn.Module:
        """Return a copy of the model with these forms, or as it is for None; it shares its parameters."""
        with Applied([Choice(change, 0) for change in self.changes(forms or {})]):
            return fresh(self.model)

    def time(self, kinds: Sequence[Forms | None], seconds: float, show: Callable[[float], None], watch=True):
        """Return the Times of the model in each of these forms."""
        models = [self.copy_in(forms) for forms in kinds]
        places = [candidate.place for candidate in self.candidates] if watch else []
        return in_place.time_in_turns(models, places, self.arguments, seconds, show=show)


def decide(trial: Trial, seconds: float, show: Show) -> Decision:
    """Return the forms in which the model is fastest: sparse layers where they are, or the faster dense model.

    Writes the layers' times into their reports: own times in the faster dense model, and with all layers sparse.
    """
    parts = iter(zip(SHARES, (0.0, 0.3, 0.8), strict=True))

    def measure(kinds: Sequence[Forms | None], what: str, watch: bool = True) -> list[Times]:
        share, before = next(parts)
        return trial.time(kinds, share * seconds, lambda done: show(before + share * done, what), watch)

    sparse, turned = trial.uniform(SPARSE), trial.uniform(CHANNELS_LAST)
    dense_kinds: list[Forms | None] = [None, turned] if CHANNELS_LAST in turned.values() else [None]
    *dense, all_sparse = measure([*dense_kinds, sparse], "timing layers in place")
    best = min(range(len(dense)), key=lambda each: min(dense[each].whole))
    layout = CHANNELS_LAST if best else DENSE
    start = estimated(trial.candidates, dense[best], all_sparse, layout)
    kinds = [start, *tries(in_order_of_calls(trial.candidates, all_sparse), start, layout)]
    tuned = start
    if len(kinds) > 1:
        tuned = chosen(trial.candidates, start, kinds, measure(kinds, "trying layers in place"))
    else:
        next(parts)
    finals: list[Forms | None] = [dense_kinds[best], tuned, *([start] if start != tuned else [])]
    if SPARSE not in tuned.values() and SPARSE not in start.values():
        finals = dense_kinds
    times = measure(finals, "comparing whole models", watch=False)
    forms = fastest(finals, times)
    dense_ms = min(statistics.median(each.whole) for kind, each in zip(finals, times, strict=True) if is_dense(kind))
    return Decision(
        forms,
        trial.changes(forms or {}),
        dense_ms,
        statistics.median(times[finals.index(forms)].whole),
    )


def is_dense(forms: Forms | None) -> bool:
    return forms is None or SPARSE not in forms.values()


def estimated(candidates: list[Candidate], dense: Times, sparse: Times, layout: int) -> Forms:
    """Return the forms that are faster in a model of all such layers; dense ones take `layout`.

    Beside sparse layers those that keep their memory order do: one that does not, and the sums after it, turn it twice.
    """
    forms = {}
    for candidate in candidates:
        place, entry = candidate.place, candidate.entry
        forms[candidate] = candidate.in_form(layout)
        if SPARSE in candidate.changes and place in dense.own and place in sparse.own:
            entry.dense_ms, entry.sparse_ms = dense.own[place], sparse.own[place]
            if sparse.span[place] < dense.span[place] and entry.sparse_ms < SURELY_DENSE * entry.dense_ms:
                forms[candidate] = SPARSE
    if SPARSE in forms.values():
        forms |= {each: DENSE for each, form in forms.items() if each.keeps and form == CHANNELS_LAST}
    return forms


def in_doubt(candidate: Candidate) -> bool:
    """Return whether the times in place leave open which form is faster."""
    entry = candidate.entry
    return SPARSE in candidate.changes and SURELY_SPARSE < entry.sparse_ms / entry.dense_ms < SURELY_DENSE


def in_order_of_calls(candidates: list[Candidate], times: Times) -> list[Candidate]:
    """Return the candidates in the order in which the model calls them, those that it does not call last."""
    order = {place: number for number, place in enumerate(times.span)}
    return sorted(candidates, key=lambda candidate: order.get(candidate.place, len(order)))


def tries(candidates: list[Candidate], start: Forms, layout: int) -> list[Forms]:
    """Return the forms to try: in each, every second layer that is in doubt is dense and not sparse, or sparse.

    Neighbours never change together, so what happens to a layer and to the next is the doing of one of them.
    """
    sparse = sum(form == SPARSE for form in start.values())
    dense = layout if 2 * sparse < len(start) else DENSE  # between sparse layers, channels_last is turned twice
    kinds = []
    for parity in (0, 1):
        half = [candidate for candidate in candidates[parity::2] if in_doubt(candidate)]
        changed = {each: each.in_form(dense) if start[each] == SPARSE else SPARSE for each in half}
        kinds += [start | changed] if changed else []
    return kinds


def chosen(candidates: list[Candidate], start: Forms, kinds: list[Forms], times: list[Times]) -> Forms:
    """Return the form of each layer with which it and the layer after it took least; sparse ones lose what is close."""
    order = list(times[0].span)
    after = dict(itertools.pairwise(order))
    forms = dict(start)
    for candidate in candidates:
        place = candidate.place
        costs: dict[int, float] = {}
        for kind, record in zip(kinds, times, strict=True):
            form = kind[candidate]
            own_try = kind is start or form != start[candidate]
            if not in_doubt(candidate) or not own_try or place not in record.span:
                continue
            cost = record.span[place] + record.span.get(after.get(place, -1), 0.0)
            costs[form] = cost + (MARGIN * record.own[place] if form == SPARSE else 0.0)
        if costs:
            forms[candidate] = min(costs, key=lambda form: costs[form])
    return forms


def fastest(kinds: Sequence[Forms | None], times: Sequence[Times]) -> Forms | None:
    """Return the fastest; the first kinds win where the others gain less than the margin."""
    best = 0
    for each in range(1, len(kinds)):
        ratios = [new / old for new, old in zip(times[each].whole, times[best].whole, strict=True)]
        if statistics.median(ratios) < 1 - WHOLE_MARGIN:
            best = each
    return kinds[best]
