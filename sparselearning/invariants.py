"""What always holds between masks, weights and optimizer, and what to do where it does not."""

import gc
import logging
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sparselearning.budgets import layers_of
from sparselearning.layer import SparseLayer
from sparselearning.patterns import with_pattern, without_pattern
from sparselearning.processes import agreement
from sparselearning.processes.group import ProcessError, current
from sparselearning.processes.sharded import count_active, fetch, is_sharded, local_part, shapes_gathered
from sparselearning.selection import drop_lowest, drop_lowest_jointly
from sparselearning.slices import are_empty, largest_of_each
from sparselearning.start.parametrized import REFUSED, stored_weights
from sparselearning.weights.borrowed import Described, described
from sparselearning.weights.finite import InvariantError, NonFiniteError, refuse_bad_gradients, refuse_bad_values

logger = logging.getLogger(__name__)

__all__ = ["InvariantError", "NonFiniteError"]

MASKINGS: weakref.WeakSet[Any] = weakref.WeakSet()  # all there are, so that no two mask one weight


def check(masking: Any) -> None:
    """Verify everything that `Masking` relies on.

    The number of active weights is what it was at the start; inactive weights are exactly zero; every mask lies
    on the device of its weight; the modules still hold the masked weights, and the optimizer still steps them. Where
    several processes train together, nobody wrote into a mask since all had the same; each process looks at what it
    holds, so that one may call it alone.

    Raises:
        InvariantError: with one line per violation.
        ProcessError: if masks of processes differ.
    """
    _refuse_edited_masks(masking)
    gathered = shapes_gathered(masking.modules)
    problems = [*_strangers(masking, gathered), *(problem for layer in masking.layers for problem in _problems(layer))]
    in_place = all(layer.compact or layer.mask.device == layer.weight.device for layer in masking.layers)
    for budget in masking.budgets if in_place else ():
        layers = layers_of(budget, masking.layers)
        expected = budget.nonzeros - sum(layer.left_over for layer in layers)
        active = sum(layer.nonzeros if is_sharded(layer.weight) else int(layer.count_active()) for layer in layers)
        if active != expected:
            some = f" of {budget.pattern!r}" if len(masking.budgets) > 1 else ""
            problems.append(
                f"{active} weights{some} are active, {expected} should be. A prune or grow function did not do "
                "what it was asked, or a mask was edited; the next update of the masks makes up for it."
            )
    if problems:
        raise InvariantError("\n".join(problems))


def _refuse_edited_masks(masking):
    if masking.disagreement:
        raise ProcessError(masking.disagreement)
    together = masking.group is not None and masking.group.size > 1
    edited = [layer.name for layer in masking.layers if layer.edited and (together or is_sharded(layer.weight))]
    if edited:
        raise ProcessError(
            f"The masks of {', '.join(edited)} were written on this process since all processes had the same. Undo "
            "it; or do the same on all, and let all call masking.load_state_dict(masking.state_dict())."
        )


def replace_others(masking: Any, new: Sequence[SparseLayer]) -> None:
    """Let every other Masking go of the weights of `new` layers; two would undo each other's masks.

    So a cell of a notebook can be run twice, and a trainer can fit twice: nobody has to find the first Masking.
    """
    weights = {id(layer.weight) for layer in new}

    def masked_elsewhere():
        shared = {other: [layer for layer in other.layers if id(layer.weight) in weights] for other in MASKINGS}
        return {other: layers for other, layers in shared.items() if layers and other is not masking}

    if masked_elsewhere():
        gc.collect()  # an optimizer and a Masking that nobody holds any more hold each other
    for other, layers in masked_elsewhere().items():
        names = ", ".join(layer.name for layer in layers)
        same = other.optimizer is masking.optimizer
        hint = "" if same else " It was made with another optimizer, whose steps would train the weights unmasked."
        logger.log(logging.INFO if same else logging.WARNING, "Another Masking lets go of %s.%s", names, hint)
        if len(layers) == len(other.layers):
            other.release()
        else:
            other._remove(layers)


def refuse_update(masking: Any) -> list[list[Described]]:
    """Check what an update relies on; return the momenta that each process holds, by rank and layer.

    Raises:
        InvariantError, NonFiniteError, ProcessError, RuntimeError: if something does not hold.
    """
    if problems := _strangers(masking):
        raise InvariantError("\n".join(problems))
    _refuse_unknown_patterns(masking)
    masking.held.refuse_update(masking.layers)
    states = [described(masking.optimizer, masking.held.stepped_for(layer)) for layer in masking.layers]
    all_facts = agreement.check_update(masking, "an update of the masks", states=states)
    refuse_bad_values(masking)
    return [facts["states"] for facts in all_facts]


def _refuse_unknown_patterns(masking):
    """Check that the density schedule is for the patterns that add_module was given densities for."""
    known = [budget.pattern for budget in masking.budgets]
    density = masking.updates.density
    for pattern in density if isinstance(density, Mapping) else ():
        if pattern not in ("*", *known):
            raise ValueError(
                f"The density schedule is for {pattern!r}, and add_module was given densities for "
                f"{', '.join(map(repr, known))}. Name the same patterns."
            )


@contextmanager
def all_or_nothing(masking: Any) -> Iterator[list[Any]]:
    """Yield copies of the masks, as `SparseLayer.copy_of_mask` makes them.

    They are restored if the update fails or reads a gradient that is not finite.

    Raises:
        NonFiniteError: for such a gradient.
    """
    before, kept = [layer.copy_of_mask() for layer in masking.layers], {b: b.nonzeros for b in masking.budgets}
    counts = [layer.nonzeros for layer in masking.layers]
    masking._gradients_read = []
    try:
        yield before
        refuse_bad_gradients(masking)
        current().meet("the end of an update of the masks")
    except BaseException:
        for layer, mask, number in zip(masking.layers, before, counts, strict=True):
            layer.put_back(mask)
            layer.nonzeros = number
            layer.agree()
        for budget, number in kept.items():
            budget.nonzeros = number
        raise
    finally:
        masking._gradients_read = None


@torch.no_grad()
def keep_last_weights(masking: Any, before: Sequence[Any]) -> None:
    """Let all processes agree on the new masks, count, and give a weight back to every layer that the update emptied.

    `before` is what the masks were. A layer without active weights passes nothing on, and no importance would let it
    grow. A magnitude that is compared over the network may empty one, a function of a user's, or a density that falls,
    and growth may leave it so. The largest weight that the layer had stays then, and in its place the smallest of the
    others of its budget leaves, so that the number of active weights is the same. With blocks these are blocks. Layers
    whose units differ in size exchange none, and grow what they lost.
    """
    masking._agree_and_count()
    masks = {layer.name: mask for layer, mask in zip(masking.layers, before, strict=True)}
    for budget in masking.budgets:
        with masking.only(budget):
            _refill(masking, [masks[layer.name] for layer in masking.layers])


def _refill(masking, before):
    layers = masking.layers
    if all(layer.nonzeros and layer.norm_dim is None for layer in layers):
        return
    before = [layer.mask_of(copy) for layer, copy in zip(layers, before, strict=True)]
    alike = len({layer.pattern.step(layer.shape) for layer in layers}) == 1
    for group in [layers] if alike else [[layer] for layer in layers if layer.norm_dim is not None]:
        added = 0
        for layer in group:
            last = _given_back(layer, before[layers.index(layer)])
            added += _count(last & ~layer.mask)
            layer.take(layer.mask | without_pattern(last))
        _drop_smallest(group, added - min(added, max(masking.baseline_nonzero - masking.total_nonzero, 0)))
    masking._agree_and_count()


def _given_back(layer, before):
    """Return the mask of what a layer, or each slice of it that weight_norm divides by its norm, may not lose."""
    if layer.norm_dim is None:
        return torch.zeros_like(layer.mask) if layer.nonzeros or not _count(before) else _largest_unit(layer, before)
    empty = are_empty(layer.mask & (_magnitude(layer) > 0), layer.norm_dim)  # a weight that has just grown is zero
    return largest_of_each(_magnitude(layer), before & empty, layer.norm_dim)


def _drop_smallest(layers, number):
    """Drop the smallest weights of all layers, but leave each its largest, or that of each slice."""
    if not number:
        return
    lasting = [
        _largest_unit(layer, layer.mask)
        if layer.norm_dim is None
        else largest_of_each(_magnitude(layer), layer.mask, layer.norm_dim)
        for layer in layers
    ]
    others = [
        with_pattern(without_pattern(layer.mask) & ~last, layer.pattern)
        for layer, last in zip(layers, lasting, strict=True)
    ]
    kept = drop_lowest_jointly([_magnitude(layer) for layer in layers], others, number)
    for layer, last, rest in zip(layers, lasting, kept, strict=True):
        layer.take(last | rest)


def _largest_unit(layer, mask):
    """Return the mask of the unit whose weights are largest among those of `mask`."""
    mask = with_pattern(without_pattern(mask).clone(), layer.pattern)
    return drop_lowest(_magnitude(layer), mask, _count(mask) - layer.pattern.size)


def _magnitude(layer):
    """Return the magnitudes of weights, also of those that keep their values while they are inactive."""
    return layer.memory.get("dense", layer.master).abs()


def _count(mask):
    return int(fetch([count_active(mask)])[0])


def stepped_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps, also of those it is given other tensors for."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return stepped.union(*(other.held.stepped_weights() for other in MASKINGS if other.optimizer is optimizer))


def _strangers(masking, gathered: Collection[torch.Size] = ()):
    """Return what is wrong with who owns and who steps the weights; of `gathered` shapes FSDP2 may show others."""
    owned = {id(parameter) for module in masking.modules for parameter in module.parameters()}
    stepped = stepped_by(masking.optimizer)
    replaced = "the module holds another parameter now, which is not masked. Replace parameters before add_module, or "
    masked = {id(layer.weight): layer.name for layer in masking.layers}
    late = (each for module in masking.modules for each in stored_weights(module) if id(each.parameter) in masked)
    problems = [
        f"{masked[id(each.parameter)]}: {each.reason.removeprefix(REFUSED)}."
        for each in late
        if each.reason.startswith(REFUSED)
    ]
    problems += [
        f"{layer.name}: {replaced}make a new Masking."
        for layer in masking.layers
        if id(layer.weight) not in owned and not (is_sharded(layer.weight) and layer.weight.shape in gathered)
    ]
    return problems + [
        f"{layer.name}: the optimizer does not step it. Make the Masking with the optimizer that trains it."
        for layer in masking.layers
        if id(layer.master) not in stepped
    ]


def _problems(layer):
    if layer.compact:
        if layer.entries.beyond is not None:
            yield f"{layer.name}: inactive weights are not zero. Call apply_mask() after writing weights."
    elif layer.mask.device != layer.weight.device:
        yield (
            f"{layer.name}: the weight is on {layer.weight.device}, its mask on {layer.mask.device}. "
            "Call apply_mask() after moving the model."
        )
    elif (local_part(layer.weight).masked_fill(local_part(layer.mask), 0) != 0).any():
        yield f"{layer.name}: inactive weights are not zero. Call apply_mask() after writing weights."
    elif layer.norm_dim is not None and are_empty(layer.mask & (layer.weight != 0), layer.norm_dim).any():
        yield f"{layer.name}: a slice has no weight but zeros, and weight_norm divides by its norm."
