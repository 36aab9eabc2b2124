"""What is saved between two steps of the gradients that were observed of a layer's weight."""

from __future__ import annotations

import math
from typing import Any

from sparselearning.layer import SparseLayer
from sparselearning.loading import (
    MOST_STEPS,
    check_entries,
    check_number,
    check_tensor,
    check_whole,
    describe,
    refuse,
)
from sparselearning.sparse.candidates import CandidateSet, check_candidates
from sparselearning.sparse.held import Held
from sparselearning.sparse.observed import Change, Observed, Pass, Seen

PARTS = ("gradient", "observed", "observing", "last", "candidates")


def state_of_observed(observed: Observed) -> dict[str, Any]:
    """Return the observed gradients of a layer, in the form in which they are kept."""
    state: dict[str, Any] = {"observed": observed.steps, "observing": observed.observing, "gradient": observed.sum}
    if observed.last is not None:
        parts = [{key: part for key, part in vars(each).items() if part is not None} for each in observed.last.passes]
        state["last"] = {"passes": parts, **vars(observed.last.change)}
    if observed.candidates is not None:
        state["candidates"] = observed.candidates.state_dict()
    return state


def load_observed(module: Held, state: dict[str, Any]) -> None:
    """Take what `state_of_observed` returned; an empty state stands for no observed gradients."""
    observed, device = module.observed, module.value.device
    observed.forget()
    observed.shared = True  # all processes load the same
    observed.steps, observed.observing = state.get("observed", 0), state.get("observing", observed.observing)
    gradient = state.get("gradient")
    if gradient is not None and observed.window == 1:  # of a file of an earlier release
        observed.last = Seen(module, [Pass(dense=gradient.to(device, copy=True))], Change())
    elif gradient is not None:
        observed.sum, observed.among = gradient.to(device, copy=True), None
    if (last := state.get("last")) is not None:
        passes = [Pass(**{key: part.to(device, copy=True) for key, part in each.items()}) for each in last["passes"]]
        observed.last = Seen(module, passes, Change(last["factor"], last["bound"]))
    if (candidates := state.get("candidates")) is not None:
        start, column, total = (candidates[name].to(device, copy=True) for name in ("start", "column", "sum"))
        observed.candidates = CandidateSet(start, column, module.entries.width, total, candidates["steps"])
        observed.among = observed.among or len(column)
    if not (observed.last or observed.sum is not None or observed.candidates):
        observed.steps = 0


def check_observed(layer: SparseLayer, state: Any) -> None:
    """Check a saved state of the observed gradient of a layer's weight.

    Raises:
        RuntimeError: if it is none.
    """
    entry = f"'sparse_training'['layers'][{layer.name!r}]"
    check_entries(entry, state, (), PARTS)
    seen = [part for part in ("gradient", "last", "candidates") if state.get(part) is not None]
    if "gradient" in seen:
        check_tensor(f"{entry}['gradient']", state["gradient"], layer.shape, "floating")
    if "last" in seen:
        check_last(f"{entry}['last']", layer, state["last"])
    if "candidates" in seen:
        rows, *rest = layer.shape
        check_candidates(f"{entry}['candidates']", state["candidates"], rows, math.prod(rest))
    check_whole(f"{entry}['observed']", state.get("observed", 0), int(bool(seen)), MOST_STEPS if seen else 0)
    if not isinstance(state.get("observing", True), bool):
        refuse(f"{entry}['observing']", "True or False", describe(state["observing"]))


def check_last(entry: str, layer: SparseLayer, last: Any) -> None:
    """Check the passes of one step: inputs and gradients of outputs that fit the layer, or a dense gradient."""
    check_entries(entry, last, ("passes", "factor", "bound"))
    check_number(f"{entry}['factor']", last["factor"], -math.inf, math.inf)
    if last["bound"] is not None:
        check_number(f"{entry}['bound']", last["bound"], 0, math.inf)
    if not isinstance(last["passes"], list) or not last["passes"]:
        refuse(f"{entry}['passes']", "a list of passes", describe(last["passes"]))
    for each in last["passes"]:
        check_entries(f"{entry}['passes']", each, (), ("x", "dy", "dense"))
        if each.keys() == {"dense"}:
            check_tensor(f"{entry}['dense']", each["dense"], layer.shape, "floating")
            continue
        check_entries(f"{entry}['passes']", each, ("x", "dy"))
        for key in ("x", "dy"):
            check_tensor(f"{entry}[{key!r}]", each[key], None, "floating")
        module = getattr(layer, "module", None)
        if module is not None and not module.belong(each["x"], each["dy"]):
            refuse(f"{entry}['passes']", "activations of this layer", f"{describe(each['x'])}, {describe(each['dy'])}")
