"""What a saved state of masks has to be before any of it is taken: names, types, shapes and ranges of all its entries.

A checkpoint may come from anybody. Each check raises a RuntimeError that names the entry, what was expected and what
came.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparselearning.patterns import UNSTRUCTURED, with_most
from sparselearning.processes.sharded import local_part

REQUIRED = ("mask", "removed", "importance", "prune_rate")  # of a layer
OPTIONAL = ("ever_active", "memory", "kept", "most", "trained")
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


def check_layers(layers: Sequence[Any], saved: Any) -> None:
    """Check that a saved state is of these layers: names, shapes, patterns, and all else that `state_dict` returns.

    Raises:
        RuntimeError: if it is not; the message names the differences.
    """
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        refuse("'layers'", "a dict of layers by name", describe(saved))
    here = {layer.name: tuple(layer.mask.shape) for layer in layers}
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
        check_layer(layer.name, entry, layer.mask, layer.mask[0].numel() if layer.mask.dim() else 1)
        if layer.pattern != UNSTRUCTURED and not with_most(layer.pattern, entry.get("most")).holds(entry["mask"]):
            raise RuntimeError(
                f"The mask of {layer.name} in the state is not of the pattern {layer.pattern.name!r}. Call "
                "add_module with the pattern and the density that were saved."
            )


def _shape_of(name: str, saved: Any) -> tuple[int, ...]:
    """Return the shape of a layer's mask in a saved state."""
    saved = check_entries(f"layers[{name!r}]", saved, REQUIRED, OPTIONAL)
    check_tensor(f"layers[{name!r}]['mask']", saved["mask"])
    return tuple(saved["mask"].shape)


def check_layer(name: str, state: Any, mask: Tensor, group: int) -> None:
    """Check the state of one layer, whose mask here is `mask`; `group` is the largest fan-in it can have."""
    entry, shape, size = f"layers[{name!r}]", mask.shape, mask.numel()
    check_entries(entry, state, REQUIRED, OPTIONAL)
    check_tensor(f"{entry}['mask']", state["mask"], shape, torch.bool)
    check_tensor(f"{entry}['ever_active']", state.get("ever_active", state["mask"]), shape, torch.bool)
    check_whole(f"{entry}['removed']", state["removed"], -size, size)
    check_number(f"{entry}['importance']", state["importance"], -math.inf, math.inf)
    check_number(f"{entry}['prune_rate']", state["prune_rate"], 0, 1)
    if (most := state.get("most")) is not None:
        check_whole(f"{entry}['most']", most, 1, group)
    if not isinstance(state.get("trained"), bool | None):
        refuse(f"{entry}['trained']", "True, False or None", describe(state["trained"]))
    check_memory(f"{entry}['memory']", state.get("memory", {}), mask)


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


def check_memory(entry: str, memory: Any, mask: Tensor) -> None:
    """Check what functions have kept of one layer: tensors that take no more memory than they took in the file."""
    if not isinstance(memory, dict) or not all(isinstance(name, str) for name in memory):
        refuse(entry, "a dict of tensors by name", describe(memory))
    for name, value in memory.items():
        check_tensor(f"{entry}[{name!r}]", value)
        here = local_part(value)
        held = max(here.untyped_storage().nbytes() // here.element_size(), mask.numel(), 2**16)
        if here.numel() > held:
            refuse(f"{entry}[{name!r}]", f"at most {held} numbers", describe(value))
    if "sign" in memory:  # of Deep Rewiring
        check_tensor(f"{entry}['sign']", memory["sign"], mask.shape, torch.int8)


def check_masking(masking: Any, state: dict[str, Any]) -> None:
    """Check the numbers of a Masking, and what its way to hold weights has saved; `check_layer` is for the rest."""
    size = sum(layer.mask.numel() for layer in masking.layers)
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
    size = sum(layer.mask.numel() for layer in masking.layers)
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


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Check the saved state of an optimizer, which torch would take as it is and fail with at the next step."""
    divided = hasattr(optimizer, "consolidate_state_dict")  # ZeroRedundancyOptimizer, whose whole state is far
    own = torch.optim.Optimizer.state_dict(optimizer) if divided else optimizer.state_dict()
    check_entries("'optimizer'", state, ("state", "param_groups"), tuple(own))
    entries, groups = state["state"], state["param_groups"]
    if not isinstance(entries, dict) or not isinstance(groups, list):
        refuse("'optimizer'", "a dict of states and a list of groups", f"{describe(entries)} and {describe(groups)}")
    weights, places = {}, {}
    for group, here in zip(own["param_groups"], optimizer.param_groups, strict=True):
        places |= {id(weight): index for weight, index in zip(here["params"], group["params"], strict=True)}
    for saved, here in zip(groups, optimizer.param_groups, strict=False):  # torch compares their numbers
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
            refuse("'param_groups'", "dicts with a list of params", describe(saved))
        check_hyperparameters(saved, here)
        weights |= dict(zip([repr(index) for index in saved["params"]], here["params"], strict=False))
    for index, entry in entries.items():
        weight = weights.get(repr(index))
        if weight is not None:
            place, here = f"'state'[{describe(index)}]", own["state"].get(places[id(weight)]) or {}
            check_state_of(place, entry, weight, here)
            if missing := [name for name in here if entry and name not in entry and name != "max_exp_avg_sq"]:
                refuse(place, ", ".join(map(str, here)), f"no {missing[0]}")


def check_hyperparameters(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Check that a saved group has the hyperparameters of the one here, and that its numbers are numbers."""
    for name, value in here.items():
        if name not in saved and isinstance(value, int | float | tuple) and type(value) is not bool:
            refuse(f"'param_groups'[{name!r}]", describe(value), "none")  # torch fills in flags alone
        if name not in saved or name == "params":
            continue
        entry, found = f"'param_groups'[{name!r}]", saved[name]
        if isinstance(value, int | float) and type(value) is not bool:
            check_number(entry, number_of(found) if name == "lr" else found, -math.inf, math.inf)
        elif isinstance(value, bool) and type(found) is not bool:
            refuse(entry, "True or False", describe(found))
        elif name == "capturable" and found and not value and here["params"][0].device.type == "cpu":
            refuse(entry, "False on a CPU", describe(found))  # torch refuses it at the next step
        elif isinstance(value, tuple) and (not isinstance(found, tuple | list) or len(found) != len(value)):
            refuse(entry, f"{len(value)} numbers", describe(found))
    if "lr" in saved:
        check_number("'param_groups'['lr']", number_of(saved["lr"]), 0, math.inf)


def number_of(value: Any) -> Any:
    """Return the number in a tensor of one; all else as it is."""
    one = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and value.numel() == 1
    return value.item() if one else value


LIKE_WEIGHT = (
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "prev", "step_size"),
)


def check_state_of(entry: str, state: Any, weight: Tensor, here: dict[str, Any]) -> None:
    """Check the saved optimizer state of one weight, whose state here, if it has one, is `here`."""
    if not isinstance(state, dict):
        refuse(entry, "a dict", describe(state))
    for name, value in state.items():
        part = f"{entry}[{describe(name)}]"
        if isinstance(value, Tensor):
            check_tensor(part, value)
        if name == "step":
            check_number(part, number_of(value), 0, math.inf)
        elif name in LIKE_WEIGHT and (value is not None or isinstance(here.get(name), Tensor)):
            check_like(part, value, here.get(name), weight)


def check_like(entry: str, value: Any, known: Any, weight: Tensor) -> None:
    """Check a tensor with a number for each weight; `known` is the one here, if there is one."""
    like = known if isinstance(known, Tensor) else weight
    # Values on sparse kernels are a vector here, and dense in the file.
    dense = like is weight and weight.dim() == 1 and getattr(value, "ndim", 0) > 1
    check_tensor(entry, value, None if dense else like.shape)
    if value.is_complex() and not weight.is_complex():
        refuse(entry, "real numbers", describe(value))
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        refuse(entry, "a number for each weight", "one for several")  # torch cannot write to it


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
