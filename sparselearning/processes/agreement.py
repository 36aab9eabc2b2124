"""What the processes that share masks have in common, compared when they meet: layers, steps, masks and weights."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparselearning.processes.group import ProcessError, current
from sparselearning.processes.sharded import extent_of, local_part

CLOSE = 1e-6  # of a layer's norm: sums of equal weights differ by less, those of two networks by more


def check_network(masking: Any, layers: Sequence[Any]) -> None:
    """Compare name and shape of new layers before any mask is exchanged, and their weights if nobody gave a group.

    Raises:
        ProcessError: on every process, if they differ.
    """
    group = current()
    if group.size == 1:
        return
    named = [f"{layer.name} {tuple(layer.shape)}" for layer in layers]
    facts = {"layers": named, "steps": masking.steps, **_weights(layers, group)}
    _compare(group, group.meet("add_module", **facts))


def check_update(masking: Any, place: str, **more: Any) -> list[dict[str, Any]]:
    """Compare all that processes have in common before they move their masks; return the facts of each by rank.

    `more` are facts that may differ.

    Raises:
        ProcessError: on every process, if something differs, or if one of them does not come.
    """
    group, layers = current(), masking.layers
    if group.size == 1:
        return []
    text = "".join(f"{layer.name} {tuple(layer.shape)}" for layer in layers)
    facts = {
        "layers": hashlib.sha256(text.encode()).hexdigest(),
        "steps": masking.steps,
        "masks": _checksum_of_all(layers),
        **_weights(layers, group),
        **more,
    }
    all_facts = group.meet(place, **facts)
    _compare(group, all_facts)
    return all_facts


def check_agreement(masks: Iterable[Any], place: str = "a comparison of masks") -> None:
    """Compare the checksums of the masks of all processes, tensors or layers. One process alone does nothing.

    Raises:
        ProcessError: on every process, if the masks differ.
    """
    group = current()
    if group.size > 1:
        masks = list(masks)
        facts = {"parts": _parts(masks), "masks": _checksum_of_all(masks)}
        _compare(group, group.meet(place, **facts))


def _weights(layers, group):
    """Return the parts of the weights that this process holds, with sum and norm of each if they are to be equal."""
    facts: dict[str, Any] = {"parts": _parts(layers)}
    if group.assumed and layers:
        here = [layer.entries.value if layer.compact else local_part(layer.master) for layer in layers]
        here = [weight.detach() for weight in here]
        exact = torch.float32 if here[0].device.type == "mps" else torch.float64  # whatever the order of the sum
        sums = [torch.stack([part.sum(dtype=exact), part.float().norm().to(exact)]).to(here[0].device) for part in here]
        facts["weights"] = torch.stack(sums).tolist()
    return facts


def _parts(masks):
    """Return which entries of each mask this process holds; processes of equal parts have equal masks."""
    return [repr(tuple(mask.shape)) if _is_compact(mask) else extent_of(_tensor(mask)) for mask in masks]


def _is_compact(mask):
    return getattr(mask, "compact", False) or getattr(mask, "start_places", None) is not None


def _tensor(mask):
    return mask if isinstance(mask, Tensor) else mask.mask


def _checksum_of_all(masks):
    sums = [mask.checksum() if _is_compact(mask) else checksum(local_part(_tensor(mask))) for mask in masks]
    total = torch.tensor(0, device=sums[0].device if sums else None)
    for i, part in enumerate(sums):
        total = total + part.to(total.device) * (2 * i + 1)
    return total.item()


def checksum(mask: Tensor) -> Tensor:
    """Return a number (int64, 0-d) that depends on the size of a mask and on the positions of its active entries."""
    return checksum_of(mask.flatten().nonzero().flatten(), mask.numel())


def checksum_of(position: Tensor, size: int) -> Tensor:
    """Return the checksum of a mask of this size whose active entries are at these positions, int64."""
    mixed = position.clone()
    for factor in (-7046029254386353131, -4658895280553007687):  # of splitmix64, so that neighbours differ strongly
        mixed = (mixed + 1) * factor
        mixed = mixed ^ (mixed >> 31)
    return mixed.sum() + size * (size - len(position))


def _compare(group, all_facts):
    """Raise a ProcessError if what should be equal on all processes differs from the first that holds the same."""
    first = all_facts[0]
    for rank, facts in zip(group.ranks, all_facts, strict=True):
        if facts.get("layers") != first.get("layers"):
            raise ProcessError(_other_layers(group.ranks[0], first["layers"], rank, facts["layers"]))
        if facts.get("steps") != first.get("steps"):
            raise ProcessError(
                f"Process {rank} has made {facts['steps']} steps of the optimizer, and process {group.ranks[0]} "
                f"{first['steps']}: their masks would move at other times, and their momenta differ. Give all "
                "processes equally many batches (DistributedSampler, drop_last=True; not Join), and one checkpoint."
            )
    same: dict[str, tuple[int, dict[str, Any]]] = {}
    pairs = [
        (rank, facts, *same.setdefault(repr(facts["parts"]), (rank, facts)))
        for rank, facts in zip(group.ranks, all_facts, strict=True)
    ]
    if differing := [(rank, other) for rank, facts, other, its in pairs if facts.get("masks") != its.get("masks")]:
        raise ProcessError(
            f"The masks of rank {', '.join(str(rank) for rank, _ in differing)} differ from those of rank "
            f"{differing[0][1]}. Expected the same on all processes: make the same calls of add_module, remove_weight "
            "and load_state_dict on each."
        )
    for rank, facts, other, its in pairs:
        for i, (mine, theirs) in enumerate(zip(facts.get("weights", ()), its.get("weights", ()), strict=True)):
            if not _close(mine, theirs):
                raise ProcessError(_other_weights(rank, other, i))


def _other_layers(rank, layers, other, others):
    if isinstance(layers, str):
        return f"Processes {rank} and {other} mask other layers. Call add_module and remove_weight alike on all."
    here = next((name for name in layers if name not in others), "no layer more")
    there = next((name for name in others if name not in layers), "no layer more")
    return (
        f"Processes {rank} and {other} do not train the same network: {rank} has {here}, {other} has {there}. Where "
        "processes train several networks (pipeline stages, two trainings), say which belong together: "
        "add_module(model, process_group=...)."
    )


def _close(mine, theirs):
    (total, norm), (other, its) = mine, theirs
    if not all(map(math.isfinite, (total, norm, other, its))):
        return True  # told as such before an update
    return abs(total - other) <= CLOSE * max(norm, its)


def _other_weights(rank, other, place):
    return (
        f"The weights of processes {rank} and {other} differ, in layer {place} of the masked ones first, so that one "
        "mask cannot fit both. If all processes train one network, wrap it in DistributedDataParallel or seed it alike "
        "before add_module. If they train several (pipeline stages, two trainings), say which belong together: "
        "add_module(model, process_group=...)."
    )
