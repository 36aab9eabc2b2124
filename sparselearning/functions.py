"""What a prune, redistribute or grow function is: how it is named, checked and marked.

    prune(masking, mask, weight, name) -> mask
    redistribute(masking, name, weight, mask) -> importance >= 0
    grow(masking, name, new_mask, total_regrowth, weight) -> mask

and for the whole network at once, marked `@network_wide` (`@single_weights` marks those that know no patterns):

    prune(masking) -> {name: mask}
    grow(masking, total_regrowth) -> {name: mask}

A redistribute function marked `@after_pruning` measures what pruning left.
"""

import inspect
from collections.abc import Callable, Mapping

SIGNATURES = {
    "prune_mode": ("masking", "mask", "weight", "name"),
    "redistribution_mode": ("masking", "name", "weight", "mask"),
    "growth_mode": ("masking", "name", "new_mask", "total_regrowth", "weight"),
}
NETWORK_WIDE_SIGNATURES = {"prune_mode": ("masking",), "growth_mode": ("masking", "total_regrowth")}


class FunctionError(TypeError):
    """A prune, redistribute or grow function that does not do what its kind does."""


def network_wide(function: Callable) -> Callable:
    """Mark a prune or grow function that treats all layers at once."""
    function.network_wide = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def is_network_wide(function: Callable) -> bool:
    """Tell whether a function was marked with `network_wide`."""
    return getattr(function, "network_wide", False)


def after_pruning(function: Callable) -> Callable:
    """Mark a redistribute function that measures the layers when pruning is over."""
    function.after_pruning = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def measures_after_pruning(function: Callable) -> bool:
    """Tell whether a function was marked with `after_pruning`."""
    return getattr(function, "after_pruning", False)


def single_weights(function: Callable) -> Callable:
    """Mark a prune or grow function that chooses single weights whatever the pattern of a layer (patterns.py)."""
    function.single_weights = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def resolve(argument: str, mode: str | Callable, table: Mapping[str, Callable]) -> Callable:
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
    signatures = NETWORK_WIDE_SIGNATURES if is_network_wide(mode) else SIGNATURES
    if argument not in signatures:
        raise FunctionError(f"A {argument} function measures one layer; it cannot be network_wide.")
    expected = signatures[argument]
    try:
        inspect.signature(mode).bind(*expected)
    except TypeError as error:
        name = getattr(mode, "__name__", repr(mode))
        raise FunctionError(
            f"{argument} function {name}{inspect.signature(mode)} cannot be called as "
            f"{name}({', '.join(expected)}): {error}."
        ) from None
    return mode
