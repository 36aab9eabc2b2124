"""What always holds between masks, weights and optimizer, and what to do where it does not."""

import gc
import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparselearning.budgets import layers_of
from sparselearning.layers import SparseLayer, count
from sparselearning.patterns import with_pattern, without_pattern
from sparselearning.processes import distributed
from sparselearning.processes.sharded import count_active, fetch, is_sharded
from sparselearning.selection import drop_lowest, drop_lowest_jointly
from sparselearning.slices import are_empty, largest_of_each
from sparselearning.start.parametrized import REFUSED, stored_weights

logger = logging.getLogger(__name__)

MASKINGS: weakref.WeakSet[Any] = weakref.WeakSet()  # all there are, so that no two mask one weight


class InvariantError(RuntimeError):
    """Masks, weights and optimizer no longer belong together; the message lists what differs and what to do."""


class NonFiniteError(ValueError):
    """A weight, gradient or momentum is NaN or infinite, so that no choice among weights would mean anything."""


def check(masking: Any) -> None:
    """Verify everything that `Masking` relies on.

    The number of active weights is what it was at the start; inactive weights are exactly zero; every mask lies
    on the device of its weight; the modules still hold the masked weights, and the optimizer still steps them. Where
    several processes train together all call it, and their masks are the same.

    Raises:
        InvariantError: with one line per violation.
        ProcessError: if masks of processes differ.
    """
    distributed.check_agreement(masking.masks.values())
    problems = [*_strangers(masking), *(problem for layer in masking.layers for problem in _problems(layer))]
    in_place = all(layer.mask.device == layer.weight.device for layer in masking.layers)
    for budget in masking.budgets if in_place else ():
        layers = layers_of(budget, masking.layers)
        expected = budget.nonzeros - sum(layer.left_over for layer in layers)
        active = sum(int(count_active(layer.mask)) for layer in layers)
        if active != expected:
            some = f" of {budget.pattern!r}" if len(masking.budgets) > 1 else ""
            problems.append(
                f"{active} weights{some} are active, {expected} should be. A prune or grow function did not do "
                "what it was asked, or a mask was edited; the next update of the masks makes up for it."
            )
    if problems:
        raise InvariantError("\n".join(problems))


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


def refuse_update(masking: Any) -> None:
    """Check what an update relies on.

    Raises:
        InvariantError, NonFiniteError, ProcessError, RuntimeError: if something does not hold.
    """
    if problems := _strangers(masking):
        raise InvariantError("\n".join(problems))
    _refuse_unknown_patterns(masking)
    masking.held.refuse_update(masking.layers)
    refuse_bad_values(masking)
    distributed.check_agreement(masking.masks.values())


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
def all_or_nothing(masking: Any) -> Iterator[list[Tensor]]:
    """Yield copies of the masks, and restore them if the update fails or reads a gradient that is not finite.

    Raises:
        NonFiniteError: for such a gradient.
    """
    before, kept = [layer.mask.clone() for layer in masking.layers], {b: b.nonzeros for b in masking.budgets}
    masking._gradients_read = []
    try:
        yield before
        refuse_bad_gradients(masking)
    except BaseException:
        for layer, mask in zip(masking.layers, before, strict=True):
            layer.mask.copy_(mask)
        count(masking.layers)
        for budget, number in kept.items():
            budget.nonzeros = number
        raise
    finally:
        masking._gradients_read = None


@torch.no_grad()
def keep_last_weights(masking: Any, before: Sequence[Tensor]) -> None:
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
            _refill(masking, [masks[name] for name in masking.masks])


def _refill(masking, before):
    layers = masking.layers
    if all(layer.nonzeros and layer.norm_dim is None for layer in layers):
        return
    alike = len({layer.pattern.step(layer.mask.shape) for layer in layers}) == 1
    for group in [layers] if alike else [[layer] for layer in layers if layer.norm_dim is not None]:
        added = 0
        for layer in group:
            last = _given_back(layer, before[layers.index(layer)])
            added += _count(last & ~layer.mask)
            layer.mask.logical_or_(without_pattern(last))
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
        layer.mask.copy_(last | rest)


def _largest_unit(layer, mask):
    """Return the mask of the unit whose weights are largest among those of `mask`."""
    mask = with_pattern(without_pattern(mask).clone(), layer.pattern)
    return drop_lowest(_magnitude(layer), mask, _count(mask) - layer.pattern.size)


def _magnitude(layer):
    """Return the magnitudes of weights, also of those that keep their values while they are inactive."""
    return layer.memory.get("dense", layer.master).abs()


def _count(mask):
    return int(fetch([count_active(mask)])[0])


def refuse_bad_values(masking: Any) -> None:
    """Check that weights and momenta are finite and no weight was trained unmasked, in one synchronisation if so.

    Raises:
        InvariantError: if a weight has more nonzero entries than active ones; naming the layers.
        NonFiniteError: naming the layers.
    """
    tensors = {}
    for layer in masking.layers:
        state = masking.optimizer.state.get(masking.held.stepped_for(layer), {})
        momenta = {key: state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in state}
        for kind, tensor in {"weight": layer.master, **momenta}.items():
            if isinstance(tensor, Tensor):
                tensors[layer.name, kind] = tensor
    # The sum of finite numbers may overflow, but it is many times cheaper than looking at each of them.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    whole = [layer for layer in masking.layers if not is_sharded(layer.master)]
    excess = [(layer.master.count_nonzero() - layer.nonzeros).to(torch.float32) for layer in whole]
    fetched = fetch(sums + excess)
    unmasked = [layer.name for layer, count in zip(whole, fetched[len(sums) :], strict=True) if count > 0]
    if unmasked:
        raise InvariantError(
            f"More weights are not zero than are active in {', '.join(unmasked)}. Another optimizer than the Masking's "
            "trains them, or something wrote into them: make the Masking with the optimizer that trains, or call "
            "apply_mask() after writing weights."
        )
    if not all(map(math.isfinite, fetched[: len(sums)])):
        _refuse_what_is_not_finite(tensors)


def refuse_bad_gradients(masking: Any) -> None:
    """Check that the gradients that the functions read are finite, in one synchronisation if so.

    Raises:
        NonFiniteError: naming the layers.
    """
    read = masking._gradients_read
    sums = [gradient.sum(dtype=torch.float32) for _, gradient in read]
    if not all(map(math.isfinite, fetch(sums))):
        names = {id(tensor): layer.name for layer in masking.layers for tensor in (layer.weight, layer.master)}
        _refuse_what_is_not_finite({(names.get(id(w), "a weight"), "gradient"): g for w, g in read})


def _refuse_what_is_not_finite(tensors):
    counts = fetch([(~tensor.isfinite()).sum() for tensor in tensors.values()])
    bad = [f"{kind} of {name}" for (name, kind), count in zip(tensors, counts, strict=True) if count]
    if bad:
        raise NonFiniteError(
            f"NaN or infinite: {', '.join(bad)}. The masks stay as they are. Training has diverged: go back to the "
            "last checkpoint, and lower the learning rate or clip the gradients."
        )


def stepped_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps, also of those it is given other tensors for."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return stepped.union(*(other.held.stepped_weights() for other in MASKINGS if other.optimizer is optimizer))


def _strangers(masking):
    """Return what is wrong with who owns and who steps the weights."""
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
        f"{layer.name}: {replaced}make a new Masking." for layer in masking.layers if id(layer.weight) not in owned
    ]
    return problems + [
        f"{layer.name}: the optimizer does not step it. Make the Masking with the optimizer that trains it."
        for layer in masking.layers
        if id(layer.master) not in stepped
    ]


def _problems(layer):
    if layer.mask.device != layer.weight.device:
        yield (
            f"{layer.name}: the weight is on {layer.weight.device}, its mask on {layer.mask.device}. "
            "Call apply_mask() after moving the model."
        )
    elif (layer.weight.masked_fill(layer.mask, 0) != 0).any():
        yield f"{layer.name}: inactive weights are not zero. Call apply_mask() after writing weights."
    elif layer.norm_dim is not None and are_empty(layer.mask & (layer.weight != 0), layer.norm_dim).any():
        yield f"{layer.name}: a slice has no weight but zeros, and weight_norm divides by its norm."
