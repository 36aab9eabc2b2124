"""What a prune, redistribute or grow function is: its arguments, its marks, and how an update calls it.

    prune(masking, mask, weight, name) -> mask
    redistribute(masking, name, weight, mask) -> importance >= 0
    grow(masking, name, new_mask, total_regrowth, weight) -> mask

Functions marked `@network_wide` treat all layers at once:

    prune(masking) -> {name: mask}
    grow(masking, total_regrowth) -> {name: mask}

Marks say what a function does. The checks before training, the FLOPs and the sparse kernels read them.

    @network_wide               it treats all layers at once
    @reads("momentum")          it reads the momentum; also "gradient", "second_moment", "inactive" and "nothing"
    @single_weights             it moves single weights, and does not obey the pattern of a layer
    @entrywise                  it reads active entries alone, whatever their number of dimensions
    @after_pruning              (redistribute) it measures what pruning left
    @in_proportion              (redistribute) what full layers cannot take goes to the others by importance, too
    @gives_back                 (redistribute) no weights move between layers: each layer grows what it lost
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor

from sparselearning.budget import shares
from sparselearning.layer import count
from sparselearning.patterns import UNSTRUCTURED
from sparselearning.processes.sharded import fetch
from sparselearning.selection import drop_lowest_jointly
from sparselearning.weights.optimizer import keeps_momentum, keeps_second_moment, refuse_missing_momentum
from sparselearning.weights.together import members_of

SIGNATURES = {
    "prune_mode": ("masking", "mask", "weight", "name"),
    "redistribution_mode": ("masking", "name", "weight", "mask"),
    "growth_mode": ("masking", "name", "new_mask", "total_regrowth", "weight"),
}
NETWORK_WIDE_SIGNATURES = {"prune_mode": ("masking",), "growth_mode": ("masking", "total_regrowth")}
Function = TypeVar("Function", bound=Callable[..., Any])
READABLE = ("momentum", "gradient", "second_moment", "inactive", "nothing")


class FunctionError(TypeError):
    """A prune, redistribute or grow function that does not do what its kind does."""


# Marks


def network_wide(function: Function) -> Function:
    """Mark a prune or grow function that treats all layers at once."""
    return _mark(function, "network_wide", True)


def after_pruning(function: Function) -> Function:
    """Mark a redistribute function that measures the layers after pruning."""
    return _mark(function, "after_pruning", True)


def in_proportion(function: Function) -> Function:
    """Mark a redistribute function by whose importance the others share what full layers cannot take.

    Without this mark they share it in equal parts, and 1% of each layer stays free while others have room.
    """
    return _mark(function, "in_proportion", True)


def gives_back(function: Function) -> Function:
    """Mark a redistribute function that moves no weights between layers: each layer grows what it lost."""
    return _mark(function, "gives_back", True)


def single_weights(function: Function) -> Function:
    """Mark a prune or grow function that chooses single weights, whatever the pattern of a layer (patterns.py)."""
    return _mark(function, "single_weights", True)


def entrywise(function: Function) -> Function:
    """Mark a prune or redistribute function that looks at active entries alone, and not at where they are.

    A layer that holds only its active weights (weights='sparse') gives it these in a row: mask, weight, momentum and
    gradient are (nonzeros,), in row-major order. Other functions are given dense tensors, computed layer by layer.
    """
    return _mark(function, "entrywise", True)


def reads(*what: str) -> Callable[[Function], Function]:
    """Mark a function with what it reads besides masks and active weights.

    'momentum' and 'second_moment' are the optimizer's; 'gradient' is that of the last step; 'inactive' are the values
    of inactive weights, which weights='kept' and 'soft' keep; 'nothing' is none of these. A function without this mark
    is taken to read momentum and gradient of all weights, active or not.

    Raises:
        ValueError: for anything else.
    """
    if not what or not set(what) <= set(READABLE) or ("nothing" in what and len(what) > 1):
        raise ValueError(
            f"Expected what a function reads, some of {', '.join(map(repr, READABLE[:-1]))}, or 'nothing' alone; "
            f"got {', '.join(map(repr, what)) or 'nothing at all'}."
        )
    return lambda function: _mark(function, "reads", frozenset(what))


def is_marked(function: Callable[..., Any], mark: str) -> bool:
    """Tell whether a function has a mark, such as 'network_wide'."""
    return bool(_mark_of(function, mark))


def surely_reads(function: Callable[..., Any], what: str) -> bool:
    """Tell whether a function is marked to read this."""
    return what in (_mark_of(function, "reads") or ())


def may_read(function: Callable[..., Any], what: str) -> bool:
    """Tell whether a function reads this, or has no mark that says what it reads."""
    marked = _mark_of(function, "reads")
    return marked is None or what in marked


def _mark(function, name, value):
    setattr(function, name, value)
    return function


def _mark_of(function, name):
    while isinstance(function, partial) and not hasattr(function, name):
        function = function.func
    return getattr(function, name, None)


# Checks before training


def resolve(
    argument: str, mode: str | Callable[..., Any], table: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """Return the function that a mode argument means: itself, or its entry in the table.

    Raises:
        ValueError: if `mode` is no key of the table.
        FunctionError: if it is a function that does not take the arguments of its kind.
    """
    if not callable(mode):
        if mode in table:
            return table[mode]
        names = ", ".join(map(repr, table))
        raise ValueError(f"Unknown {argument} {mode!r}. Pass a function, or one of {names}.")
    signatures = NETWORK_WIDE_SIGNATURES if is_marked(mode, "network_wide") else SIGNATURES
    if argument not in signatures:
        raise FunctionError(f"A {argument} function measures one layer; it cannot be network_wide.")
    expected = signatures[argument]
    try:
        inspect.signature(mode).bind(*expected)
    except TypeError as error:
        name = getattr(mode, "__name__", repr(mode))
        raise FunctionError(
            f"{argument} function {name}{inspect.signature(mode)} cannot be called as "
            f"{name}({', '.join(expected)}): {error}.{_hint(argument, mode)}"
        ) from None
    return mode


def _hint(argument, mode):
    """Return what to do with a function that takes the arguments of one for the whole network."""
    try:
        inspect.signature(mode).bind(*NETWORK_WIDE_SIGNATURES.get(argument, SIGNATURES[argument]))
    except TypeError:
        return ""
    return " It treats all layers at once: mark it with @network_wide (from sparselearning import network_wide)."


def check_readable(functions: Sequence[Any], optimizer: torch.optim.Optimizer, keeps_inactive: bool) -> None:
    """Check that there is what the functions are marked to read.

    Raises:
        RuntimeError: if the optimizer keeps no momentum, or no second moment, and a function reads it.
        FunctionError: if a function reads the values of inactive weights and they are not kept.
    """
    for each in members_of(optimizer):
        if any(surely_reads(function, "momentum") for function in functions):
            keeps_momentum(each, required=True)
        if any(surely_reads(function, "second_moment") for function in functions):
            keeps_second_moment(each, required=True)
    if not keeps_inactive and any(surely_reads(function, "inactive") for function in functions):
        raise FunctionError(
            "A 'dense_magnitude' mode compares the values of inactive weights: Masking(..., weights='kept'), or 'soft'."
        )


def check_momenta(masking: Any) -> None:
    """Check that there is a momentum of every weight that has been stepped, where a function is marked to read it.

    Raises:
        RuntimeError: if there is none; settings such as `betas` promise one that not every optimizer keeps.
    """
    if any(surely_reads(function, "momentum") for function in (masking.prune, masking.grow, masking.measure)):
        for layer in masking.layers:
            if layer.trained:
                refuse_missing_momentum(masking.optimizer, masking.held.stepped_for(layer))


# Calls during an update


def measure(masking: Any) -> None:
    """Let the redistribute function say how important each layer is, as shares of the network's importance.

    Raises:
        FunctionError: if it does not return a number.
    """
    with looking(masking, masking.measure):
        importance = fetch([_measure(masking, layer) for layer in masking.layers])
    for layer, share in zip(masking.layers, shares(importance, masking.layers), strict=True):
        layer.importance = share


def _measure(masking, layer):
    value = masking.measure(masking, layer.name, layer.master, layer.mask)
    if isinstance(value, SupportsFloat) and (not isinstance(value, Tensor) or value.numel() == 1):
        return value
    came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise FunctionError(f"Expected the importance of {layer.name}, a number or a 0-d tensor, got {came}.")


def prune(masking: Any) -> None:
    """Let the prune function choose the masks, and count what it removed.

    Raises:
        FunctionError: if it does not return masks, or masks that break the pattern of a layer; also `grow`.
    """
    before = masking.name2nonzeros
    with looking(masking, masking.prune):
        if is_marked(masking.prune, "network_wide"):
            _take_all(masking, masking.prune(masking))
        else:
            for layer in masking.layers:
                _take(layer, masking.prune(masking, layer.mask, layer.master, layer.name))
    _check_patterns_hold(masking, "prune_mode", lambda layer: layer.pattern.whole(layer.mask))
    count(masking.layers)
    if masking.updates.density is not None:
        _drop_excess(masking)
    for layer in masking.layers:
        layer.removed = before[layer.name] - layer.nonzeros


def _drop_excess(masking):
    """Drop the smallest weights that are active beyond the schedule's density: a function may prune too few."""
    if (excess := masking.total_nonzero - masking.baseline_nonzero) > 0:
        with looking(masking, _drop_excess):
            scores, masks = [layer.master.abs() for layer in masking.layers], [layer.mask for layer in masking.layers]
            for layer, mask in zip(masking.layers, drop_lowest_jointly(scores, masks, excess), strict=True):
                layer.take(mask)
        count(masking.layers)


entrywise(_drop_excess)


@contextmanager
def looking(masking: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let layers that hold active weights alone show these in a row, while a function looks that is `entrywise`."""
    with ExitStack() as stack:
        for layer in masking.layers if is_marked(function, "entrywise") else ():
            if layer.compact and layer.pattern == UNSTRUCTURED:
                stack.enter_context(layer.in_rows())
        yield


def grow(masking: Any, counts: list[int]) -> None:
    """Let the grow function add this many weights to each layer."""
    if is_marked(masking.grow, "network_wide"):
        _take_all(masking, masking.grow(masking, sum(counts)))
    else:
        for layer, number in zip(masking.layers, counts, strict=True):
            if not masking.held.grow(masking.grow, layer, number):
                _take(layer, masking.grow(masking, layer.name, layer.mask, number, layer.master))
    _check_patterns_hold(masking, "growth_mode", lambda layer: layer.pattern.holds(layer.mask))


def _take_all(masking, masks):
    if isinstance(masks, int | float) and any(layer.edited for layer in masking.layers if not layer.compact):
        return  # the function wrote into masking.masks and counted, as those of release 1.0
    if not isinstance(masks, Mapping) or not masks.keys() >= {layer.name for layer in masking.layers}:
        raise FunctionError(
            f"Expected a dict from the name of every layer to its mask, got {masks!r}. "
            "A network_wide function returns {layer.name: mask for layer in masking.layers}."
        )
    for layer in masking.layers:
        _take(layer, masks[layer.name])


def _take(layer, mask):
    if not isinstance(mask, Tensor) or mask.shape != layer.weight.shape:
        came = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise FunctionError(
            f"Expected a mask of shape {tuple(layer.weight.shape)} for {layer.name}, got {came}. "
            "Prune and grow functions return the mask they were given, or a new one of its shape."
        )
    layer.take(mask)


def _check_patterns_hold(masking, argument, holds):
    layers = [layer for layer in masking.layers if layer.pattern != UNSTRUCTURED]
    kept = fetch([holds(layer) for layer in layers])
    if broken := [layer for layer, holding in zip(layers, kept, strict=True) if not holding]:
        mode = getattr(masking, argument)
        raise FunctionError(
            f"{argument}={getattr(mode, '__name__', mode)!r} does not keep the pattern {broken[0].pattern.name!r} of "
            f"{broken[0].name}. Hand the mask that the function is given to drop_lowest and add_highest, or use no "
            "pattern."
        )
