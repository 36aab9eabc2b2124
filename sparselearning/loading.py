"""What a saved state of masks has to be before any of it is taken: names, types, shapes and ranges of all its entries.

A checkpoint may come from anybody. Each check raises a RuntimeError that names the entry, what was expected and what
came.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparselearning.compact import PLACES, expanded, is_compact, position_of
from sparselearning.patterns import UNSTRUCTURED, with_most
from sparselearning.processes.sharded import local_part

REQUIRED = ("mask", "removed", "importance", "prune_rate")  # of a layer
OPTIONAL = ("ever_active", "explored", "memory", "kept", "most", "trained")
OF_ALL = ("baseline_nonzero", "layers")
OF_MASKING = ("steps", "prune_threshold")
MOST_STEPS = 2**53  # steps are divided as floats


def refuse(entry: str, expected: str, found: str) -> NoReturn:
    raise RuntimeError(
        f"The entry {entry} of the state is damaged: expected {expected}, got {found}. Load another checkpoint."
    )


def describe(value: Any) -> str:
    """Return a value in a few words, on one line."""
    if isinstance(value, Tensor):
        kind = str(value.dtype) if value.layout == torch.strided else f"{value.dtype} in {value.layout}"
        return f"a {kind} tensor of shape {tuple(value.shape)}{' without data' if value.is_meta else ''}"
    if isinstance(value, bool | int | float | str | None):
        text = "a long number" if isinstance(value, int) and value.bit_length() > 200 else repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def check_entries(entry: str, state: Any, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return a state if it is a dict with these names."""
    if not isinstance(state, dict):
        refuse(entry, "a dict", describe(state))
    if missing := [name for name in required if name not in state]:
        refuse(entry, f"{', '.join(required)}", f"no {', '.join(missing)}")
    if unknown := [name for name in state if name not in (*required, *optional)]:
        refuse(entry, f"{', '.join((*required, *optional))} alone", f"{describe(unknown[0])} too")
    return state


def check_whole(entry: str, value: Any, least: int, most: int, expected: str = "") -> None:
    """Check a whole number; True and False are none."""
    if type(value) is not int or not least <= value <= most:
        refuse(entry, expected or f"a whole number from {least} to {most}", describe(value))


def check_number(entry: str, value: Any, least: float, most: float) -> None:
    """Check a finite number."""
    good = (type(value) is int and value.bit_length() < 1000) or (isinstance(value, float) and math.isfinite(value))
    if not good or not least <= value <= most:
        bounds = f" from {least} to {most}" if most < math.inf else f" of at least {least}" if least == 0 else ""
        refuse(entry, f"a finite number{bounds}", describe(value))


def check_tensor(entry: str, value: Any, shape: Sequence[int] | None = None, dtype: Any = None) -> None:
    """Check a tensor that lies in memory: its shape, and its dtype ('floating' for any of these)."""
    wanted = " ".join(["a", *([f"{dtype}"] if dtype else []), "tensor"])
    wanted += "" if shape is None else f" of shape {tuple(shape)}"
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        refuse(entry, wanted, describe(value))
    fits = value.is_floating_point() if dtype == "floating" else dtype in (None, value.dtype)
    if not fits or (shape is not None and tuple(value.shape) != tuple(shape)):
        refuse(entry, wanted, describe(value))
    if value.dtype == torch.bool and shape is not None:
        here = local_part(value)
        if here.numel() and int(here.contiguous().view(torch.uint8).max()) > 1:
            refuse(entry, "bytes 0 and 1 in a bool tensor", "others")


def check_compact(entry: str, item: Any, shape: Any = None) -> None:
    """Check a compact form: its parts, the order of its places, and its shape if that is given.

    Raises:
        RuntimeError: if it is none.
    """
    if not is_compact(item):
        refuse(entry, f"a tensor, or {', '.join(sorted(PLACES))}", describe(item))
    found = item["shape"]
    sizes = isinstance(found, list | tuple) and found and all(type(size) is int and 0 <= size < 2**31 for size in found)
    if not sizes or math.prod(found) >= 2**62 or (shape is not None and tuple(found) != tuple(shape)):
        refuse(f"{entry}['shape']", "sizes" if shape is None else f"{tuple(shape)}", describe(found))
    check_tensor(f"{entry}['start']", item["start"], (found[0] + 1,), torch.int32)
    check_tensor(f"{entry}['column']", item["column"], None, torch.int32)
    start, column, width = item["start"].long(), item["column"], math.prod(found[1:])
    if column.dim() != 1 or start[0] != 0 or start[-1] != len(column) or (start.diff() < 0).any():
        refuse(f"{entry}['start']", f"ascending numbers from 0 to {len(column)}", "others")
    if len(column) and not 0 <= int(column.min()) <= int(column.max()) < width:
        refuse(f"{entry}['column']", f"numbers from 0 to {width - 1}", "others")
    if (position_of(item).diff() <= 0).any():
        refuse(f"{entry}['column']", "ascending numbers in each row", "others")
    if "value" in item:
        check_tensor(f"{entry}['value']", item["value"], column.shape, "floating")


def check_all_compact(entry: str, state: Any) -> None:
    """Check every compact form in nested dicts and lists."""
    left, seen = [(entry, state)], set()
    while left:
        entry, value = left.pop()
        if id(value) in seen or not isinstance(value, dict | list | tuple):
            continue
        seen.add(id(value))  # a list may hold itself
        if is_compact(value):
            check_compact(entry, value)
        else:
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{entry}[{describe(key)}]", part) for key, part in parts]


def check_layers(layers: Sequence[Any], saved: Any) -> None:
    """Check that a saved state is of these layers: names, shapes, patterns, and all else that `state_dict` returns.

    Raises:
        RuntimeError: if it is not; the message names the differences.
    """
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        refuse("'layers'", "a dict of layers by name", describe(saved))
    here = {layer.name: tuple(layer.shape) for layer in layers}
    there = {name: _shape_of(name, entry) for name, entry in saved.items()}
    if differing := [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]:
        lines = (
            f"{name}: {there.get(name, 'absent')} in the state, {here.get(name, 'absent')} here" for name in differing
        )
        raise RuntimeError(
            f"The masks are of another model. {'; '.join(lines)}. Call add_module with the model that was saved."
        )
    for layer in layers:
        entry = saved[layer.name]
        check_layer(layer.name, entry, layer.shape)
        if layer.pattern != UNSTRUCTURED and not with_most(layer.pattern, entry.get("most")).holds(
            expanded(entry["mask"])
        ):
            raise RuntimeError(
                f"The mask of {layer.name} in the state is not of the pattern {layer.pattern.name!r}. Call "
                "add_module with the pattern and the density that were saved."
            )


def _shape_of(name: str, saved: Any) -> tuple[int, ...]:
    """Return the shape of a layer's mask in a saved state."""
    saved = check_entries(f"layers[{name!r}]", saved, REQUIRED, OPTIONAL)
    if is_compact(saved["mask"]):
        check_compact(f"layers[{name!r}]['mask']", saved["mask"])
        return tuple(saved["mask"]["shape"])
    check_tensor(f"layers[{name!r}]['mask']", saved["mask"])
    return tuple(saved["mask"].shape)


def check_layer(name: str, state: Any, shape: torch.Size) -> None:
    """Check the state of one layer, whose mask has this shape."""
    entry, size = f"layers[{name!r}]", shape.numel()
    check_entries(entry, state, REQUIRED, OPTIONAL)
    for key in ("mask", "ever_active"):
        if key in state and is_compact(state[key]):
            check_compact(f"{entry}[{key!r}]", state[key], shape)
        elif key in state:
            check_tensor(f"{entry}[{key!r}]", state[key], shape, torch.bool)
    if "explored" in state:
        check_tensor(f"{entry}['explored']", state["explored"], None, torch.int64)
        hashes = state["explored"]
        if hashes.dim() != 1 or (hashes[1:] <= hashes[:-1]).any():
            refuse(f"{entry}['explored']", "ascending numbers", "others")
    check_whole(f"{entry}['removed']", state["removed"], -size, size)
    check_number(f"{entry}['importance']", state["importance"], -math.inf, math.inf)
    check_number(f"{entry}['prune_rate']", state["prune_rate"], 0, 1)
    if (most := state.get("most")) is not None:
        check_whole(f"{entry}['most']", most, 1, shape[1:].numel())
    if not isinstance(state.get("trained"), bool | None):
        refuse(f"{entry}['trained']", "True, False or None", describe(state["trained"]))
    check_memory(f"{entry}['memory']", state.get("memory", {}), shape)
    if "grown_at" in state.get("memory", {}):  # of weights/own_steps.py
        alone = is_compact(state["mask"])
        own = (len(state["mask"]["column"]),) if alone else shape
        check_tensor(f"{entry}['memory']['grown_at']", state["memory"]["grown_at"], own, torch.int32)


def check_kept(entry: str, kept: Any, memory: dict[str, Tensor]) -> None:
    """Check that all tensors are there that functions had kept; torch.distributed.checkpoint leaves out what is new."""
    if kept is None:  # of older files
        return
    check_whole(entry, kept, 0, MOST_STEPS, "a number of tensors")
    if kept != len(memory):
        raise RuntimeError(
            f"The entry {entry} of the state is to hold {kept} tensors, and holds {', '.join(memory) or 'none'}. "
            "torch.distributed.checkpoint loads into tensors that are there: put one of the same shape and dtype for "
            "each into masking.memory[name] before."
        )


def check_memory(entry: str, memory: Any, shape: torch.Size) -> None:
    """Check what functions have kept of one layer: tensors that take no more memory than they took in the file."""
    if not isinstance(memory, dict) or not all(isinstance(name, str) for name in memory):
        refuse(entry, "a dict of tensors by name", describe(memory))
    for name, value in memory.items():
        check_tensor(f"{entry}[{name!r}]", value)
        here = local_part(value)
        held = max(here.untyped_storage().nbytes() // here.element_size(), shape.numel(), 2**16)
        if here.numel() > held:
            refuse(f"{entry}[{name!r}]", f"at most {held} numbers", describe(value))
    if "sign" in memory:  # of Deep Rewiring
        check_tensor(f"{entry}['sign']", memory["sign"], shape, torch.int8)


def check_masking(masking: Any, state: dict[str, Any]) -> None:
    """Check the numbers of a Masking, and what its way to hold weights has saved; `check_layer` is for the rest."""
    size = sum(layer.size for layer in masking.layers)
    check_whole("'baseline_nonzero'", state["baseline_nonzero"], 0, size)
    check_whole("'steps'", state["steps"], 0, MOST_STEPS)
    check_number("'prune_threshold'", state["prune_threshold"], 0, math.inf)
    check_budgets(masking, state)
    held = state.get("sparse_training", {})
    if not isinstance(held, dict):
        refuse("'sparse_training'", "a dict", describe(held))
    masking.held.check_state(held, masking.layers, state["layers"])
    for layer in masking.layers:
        entry = state["layers"][layer.name]
        check_kept(f"layers[{layer.name!r}]['memory']", entry.get("kept"), entry.get("memory", {}))


def check_budgets(masking: Any, state: dict[str, Any]) -> None:
    """Check the saved budgets: those of the Masking, in its order; a Masking with one, and older files, have none."""
    saved, budgets = state.get("budgets", []), masking.budgets
    if not isinstance(saved, list):
        refuse("'budgets'", "a list", describe(saved))
    size = sum(layer.size for layer in masking.layers)
    for i, entry in enumerate(saved):
        place = f"'budgets'[{i}]"
        check_entries(place, entry, ("pattern", "nonzeros", "prune_threshold"))
        check_whole(f"{place}['nonzeros']", entry["nonzeros"], 0, size)
        check_number(f"{place}['prune_threshold']", entry["prune_threshold"], 0, math.inf)
    there, here = [describe(entry["pattern"]) for entry in saved], [describe(budget.pattern) for budget in budgets]
    if saved and (there != here or len(budgets) == 1):
        raise RuntimeError(
            f"The masks were saved with densities for {', '.join(there)}, and are loaded with densities for "
            f"{', '.join(here)}. Call add_module with the density that was saved."
        )
    if saved and sum(entry["nonzeros"] for entry in saved) != state["baseline_nonzero"]:
        refuse("'budgets'", f"{state['baseline_nonzero']} weights in all", "others")


def check_schedule(name: str, part: Any, state: Any) -> None:
    """Check the saved state of an LR scheduler or a loss scale, which takes whatever attributes it is given."""
    if not isinstance(state, dict):
        refuse(f"{name!r}", "a dict", describe(state))
    own = part.state_dict()
    for key, value in state.items():
        entry = f"{name!r}[{describe(key)}]"
        if key in own:
            check_alike(entry, value, own[key])
        elif not isinstance(key, str) or hasattr(part, key):
            refuse(entry, "none of this name", describe(value))


def check_alike(entry: str, value: Any, own: Any) -> None:
    """Check that a value has the type of the one here, and that its numbers are numbers; None stands for any."""
    if isinstance(own, dict):
        if not isinstance(value, dict):
            refuse(entry, "a dict", describe(value))
        for key in own.keys() & value.keys():
            check_alike(f"{entry}[{describe(key)}]", value[key], own[key])
    elif isinstance(own, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(own):
            refuse(entry, f"a list of {len(own)}", describe(value))
        for i, pair in enumerate(zip(value, own, strict=True)):
            check_alike(f"{entry}[{i}]", *pair)
    elif isinstance(own, bool):
        if not isinstance(value, bool):
            refuse(entry, "True or False", describe(value))
    elif isinstance(own, int | float):
        if not isinstance(value, int | float) or not (abs(value) <= MOST_STEPS or abs(value) == math.inf):
            refuse(entry, "a number", describe(value))
    elif own is not None and not isinstance(value, type(own)):
        refuse(entry, f"a {type(own).__name__}", describe(value))
