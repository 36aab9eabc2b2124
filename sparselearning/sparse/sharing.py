"""What processes that train one network exchange when its masks move: gradients for growth, and places.

A gradient for growth is the mean over the processes of what each has seen of its part of the batch. Each process can
compute it from the inputs and output gradients of all, which are sent where they are smaller than twice the weight, as
those of large linear layers are. Of other layers the dense gradients are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparselearning.processes.agreement import checksum_of
from sparselearning.sparse.averaging import Averaging
from sparselearning.sparse.candidates import CandidateSet
from sparselearning.sparse.held import Held
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.observed import Change, Pass, Seen

Found = tuple[Held, Seen | None]  # a layer and the gradient of a step


def averaged(found: Sequence[Found], averaging: Averaging, place: str) -> list[Seen | None]:
    """Return the gradients averaged over the processes; None for a layer of which none has any."""
    facts = averaging.group.meet(place, seen=[described(seen) for _, seen in found])
    return [exchanged(*pair, [each["seen"][i] for each in facts], averaging) for i, pair in enumerate(found)]


def described(seen: Seen | None) -> dict[str, Any] | None:
    """Return the shapes of the inputs and output gradients that a gradient follows from, and its change."""
    if seen is None:
        return None
    passes = [[] if x.x is None or x.dy is None else [list(x.x.shape), list(x.dy.shape)] for x in seen.passes]
    return {"passes": passes, "change": [seen.change.factor, seen.change.bound]}


def exchanged(module: Held, seen: Seen | None, facts: Sequence[Any], averaging: Averaging) -> Seen | None:
    """Return the gradient of a layer averaged over the processes; `facts` are what `described` returns on each."""
    known = next((each for each in facts if each is not None), None)
    if known is None:
        return None
    shapes = [each["passes"] if each else [] for each in facts]
    numbers = [math.prod(shape) for passes in shapes for part in passes for shape in part]
    if all(part for passes in shapes for part in passes) and sum(numbers) <= 2 * module.entries.shape.numel():
        passes = gathered(module, seen, shapes, averaging)
    else:
        total = (
            module.value.new_zeros(module.entries.shape)
            if seen is None
            else Seen(module, seen.passes, Change()).dense()
        )
        passes = [Pass(dense=mean(total, averaging))]
    return Seen(module, passes, Change(*known["change"]))


def gathered(module: Held, seen: Seen | None, shapes: Sequence[Any], averaging: Averaging) -> list[Pass]:
    """Return the passes of all processes; their gradients add up to the mean."""
    group, passes = averaging.group, []
    for rank, parts in enumerate(shapes):
        for i, (of_x, of_dy) in enumerate(parts):
            sizes = math.prod(of_x), math.prod(of_dy)
            flat = module.value.new_empty(sum(sizes))
            if rank == group.rank and seen is not None:
                own = seen.passes[i]
                assert own.x is not None
                assert own.dy is not None
                torch.cat([own.x.flatten(), own.dy.flatten() / group.size], out=flat)
                averaging.traffic.updates += flat.numel() * flat.element_size() * (group.size - 1)
            dist.broadcast(flat, src=group.ranks[rank], group=averaging.channel)
            x, dy = flat.split(sizes)
            passes.append(Pass(x.reshape(of_x), dy.reshape(of_dy)))
    return passes


@torch.no_grad()
def mean(values: Tensor, averaging: Averaging) -> Tensor:
    """Replace a tensor by its mean over the processes, in place, and return it."""
    averaging.traffic.updates += values.numel() * values.element_size()
    dist.all_reduce(values.div_(averaging.group.size), group=averaging.channel)
    return values


def choose_together(found: Sequence[Found], averaging: Averaging) -> list[Found]:
    """Let layers choose by a step's gradient the entries whose gradients are kept; return what the others have seen."""
    choosing = [pair for pair in found if pair[0].observed.chooses]
    if choosing:
        chosen = averaged(choosing, averaging, "the first observed step")
        for (module, _), seen in zip(choosing, chosen, strict=True):
            module.observed.count(seen)
        agree_on_candidates([module for module, _ in choosing], averaging)
    return [pair for pair in found if pair not in choosing]


def agree_on_candidates(modules: Sequence[Held], averaging: Averaging) -> None:
    """Let all processes keep the gradients of the same entries: processors that round otherwise may choose others."""
    own = [_sums_of(module) for module in modules]
    facts = averaging.group.meet("the choice of candidates", sums=own)
    for i, module in enumerate(modules):
        if all(each["sums"][i] == facts[0]["sums"][i] for each in facts) or not facts[0]["sums"][i]:
            continue
        size, candidates = facts[0]["sums"][i][1], module.observed.candidates
        parts = [torch.zeros(size, dtype=torch.int32), module.value.new_zeros(size)]
        start = torch.zeros(len(module.entries.start), dtype=torch.int32)
        if averaging.group.rank == 0 and candidates is not None:
            start, *parts = candidates.start, candidates.column, candidates.sum
        start, column, total = [_from_first(part, averaging) for part in (start, *parts)]
        module.observed.candidates = CandidateSet(start, column, module.entries.width, total, 1)


def _sums_of(module):
    candidates = module.observed.candidates
    if candidates is None:
        return []
    return [checksum_of(candidates.position(), module.entries.shape.numel()).item(), len(candidates.column)]


def share(modules: Sequence[Held], averaging: Averaging) -> None:
    """Average what was observed since the last update, so that all processes hold the same. All call this."""
    modules = [module for module in modules if module.observed.window]
    facts = [_facts(module) for module in modules]
    by_rank = [each["observed"] for each in averaging.group.meet("the observed gradients", observed=facts)]
    for i, module in enumerate(modules):
        observed, known = module.observed, [each[i] for each in by_rank]
        observed.steps = max(each["steps"] for each in known)
        if observed.steps and not all(each["shared"] for each in known):
            if observed.window == 1:
                observed.last = exchanged(module, observed.last, [each["last"] for each in known], averaging)
            else:
                _share_sum(module, averaging)
        observed.shared = True


def _facts(module):
    observed = module.observed
    last = None if observed.shared else described(observed.last)
    return {"steps": observed.steps, "shared": observed.shared, "last": last}


def _share_sum(module, averaging):
    observed = module.observed
    if observed.candidates is not None:
        mean(observed.candidates.sum, averaging)
        observed.candidates.steps = observed.steps
        return
    total = module.value.new_zeros(module.entries.shape) if observed.sum is None else observed.sum
    observed.sum = mean(total, averaging)


def move_as_first(layers: Sequence[CompactLayer], averaging: Averaging) -> None:
    """Let the entries of layers leave and come as on the first process."""
    if not layers:
        return
    own = [(layer.kept, layer.grown) for layer in layers]
    counts = _from_first(
        torch.tensor([[-1 if x is None else len(x) for x in pair] for pair in own]), averaging
    ).tolist()
    for i, kind in ((0, torch.bool), (1, torch.int64)):
        numbers = [max(count[i], 0) for count in counts]
        there = [part for part in (pair[i] for pair in own) if part is not None]
        first = averaging.group.rank == 0
        flat = torch.cat(there) if first and there else torch.zeros(sum(numbers), dtype=kind)
        if len(flat):
            flat = _from_first(flat.to(torch.uint8) if kind == torch.bool else flat, averaging).to(kind)
        for layer, count, part in zip(layers, counts, flat.split(numbers), strict=True):
            setattr(layer, ("kept", "grown")[i], part.clone() if count[i] >= 0 else None)


def _from_first(values, averaging):
    if averaging.group.rank == 0:
        averaging.traffic.updates += values.numel() * values.element_size()
    dist.broadcast(values, src=averaging.group.ranks[0], group=averaging.channel)
    return values
