"""What the saved state of an optimizer has to be before torch takes it.

torch would take it as it is, and fail with it at the next step. Each check raises a RuntimeError as in loading.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparselearning.loading import check_compact, check_entries, check_number, check_tensor, describe, refuse


def check_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Check the saved state of an optimizer."""
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
            if missing := [
                name for name in here if entry and name not in entry and name not in ("active", "max_exp_avg_sq")
            ]:
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
    full = getattr(weight, "full_shape", None)  # of the weight whose active values are stepped
    shapes = None if full is None else [weight.shape, torch.Size(full)]
    if "active" in state:
        check_compact(f"{entry}['active']", state["active"], full or weight.shape)
        shapes = [state["active"]["column"].shape]
    for name, value in state.items():
        part = f"{entry}[{describe(name)}]"
        if isinstance(value, Tensor):
            check_tensor(part, value)
        if name == "step":
            check_number(part, number_of(value), 0, math.inf)
        elif name in LIKE_WEIGHT and (value is not None or isinstance(here.get(name), Tensor)):
            check_like(part, value, here.get(name), weight, shapes)


def check_like(entry: str, value: Any, known: Any, weight: Tensor, shapes: list[torch.Size] | None) -> None:
    """Check a tensor with a number for each weight; `known` is the one here, if there is one.

    `shapes` are those that it may have where active values are stepped: of these, or of the weight.
    """
    like = known if isinstance(known, Tensor) else weight
    fits = shapes is not None and getattr(value, "shape", None) in shapes
    check_tensor(entry, value, None if fits else like.shape if shapes is None else shapes[-1])
    if value.is_complex() and not weight.is_complex():
        refuse(entry, "real numbers", describe(value))
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        refuse(entry, "a number for each weight", "one for several")  # torch cannot write to it
