"""What the optimizer's state of a weight starts from when the weight becomes active."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparselearning.processes.sharded import add_up, count_active
from sparselearning.weights.optimizer import keeps_no_state_per_weight, state_of


def fresh(entries: Mapping[Any, Tensor], kept: Tensor, group: Mapping[str, Any]) -> dict[Any, Any]:
    """Return what torch's optimizers begin with: zero, but for Rprop's step sizes and the sums of Adagrad."""
    begin = {"sum": group.get("initial_accumulator_value", 0.0), "step_size": group["lr"] if "etas" in group else 0.0}
    return {name: begin.get(name, 0.0) for name in entries}


def means(entries: Mapping[Any, Tensor], kept: Tensor, group: Mapping[str, Any]) -> dict[Any, Tensor]:
    """Return the means over the weights that stay active, of all processes; zero if there is none.

    So `reset_momentum` of GraNet's authors fills the state of inactive weights (https://github.com/VITA-Group/GraNet,
    CIFAR/sparselearning/core.py), signed momenta included; nothing calls it there.

    >>> means({"exp_avg_sq": torch.tensor([1.0, 3.0, 7.0])}, torch.tensor([True, True, False]), {})
    {'exp_avg_sq': tensor(2.)}
    """
    values = [value.masked_fill(~kept, 0) for value in entries.values()]
    sums = [value.sum(dtype=torch.promote_types(value.dtype, torch.float32)) for value in values]
    *sums, count = add_up([*sums, count_active(kept)])
    return {name: total / count.clamp(min=1) for name, total in zip(entries, sums, strict=True)}


# name -> (tensors with an entry for each weight by name, the weights that stay active, the optimizer's settings of the
# layer) -> the start of each tensor by name
START_STATES: Mapping[str, Callable[[Mapping[Any, Tensor], Tensor, Mapping[str, Any]], Mapping[Any, Any]]] = {
    "zero": fresh,  # also reset_state=True
    "mean": means,
    "restart": fresh,  # and the weight's own time step begins, see own_steps.py
}


def state_per_weight(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[Any, Tensor]:
    """Return by name what the optimizer keeps for each entry of a weight: momenta, second moments."""
    state = state_of(optimizer, weight)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == weight.shape}


def start_of_state(
    start: str, entries: Mapping[Any, Tensor], kept: Tensor, group: Mapping[str, Any], copies: Collection[str]
) -> dict[Any, Any]:
    """Return by name what each of the `entries`, the optimizer's state of a layer, starts from in a regrown weight.

    Args:
        start: a key of START_STATES.
        kept: which weights stay active, a mask of the shape of the entries.
        group: the optimizer's settings of the layer.
        copies: names of second copies of the weights; they start at zero, as regrown weights do.
    """
    own = {name: value for name, value in entries.items() if name not in copies}
    return {**dict.fromkeys(entries, 0.0), **START_STATES[start](own, kept, group)}


def group_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Any]:
    """Return the optimizer's settings of a weight."""
    return next(group for group in optimizer.param_groups if any(other is weight for other in group["params"]))


def refuse_unfit_optimizer(start: str | None, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer is not known to keep nothing that a mean over weights can be taken of.

    Raises:
        ValueError: if it is.
    """
    if start == "mean" and keeps_no_state_per_weight(optimizer):
        raise ValueError(_no_mean(optimizer, "keeps no state of single weights"))


def refuse_unfit_state(start: str | None, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor]) -> None:
    """Check what the optimizer keeps of weights before an update gives regrown ones a start.

    Raises:
        RuntimeError: for state in codes of 8 bits, of which zero need not mean zero; with 'mean', for state that is no
            floating-point number of each weight.
    """
    for weight in weights if start is not None else ():
        entries = state_per_weight(optimizer, weight)
        if coded := [name for name, value in entries.items() if value.dtype == torch.uint8]:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps {coded[0]!r} in codes of 8 bits, so that no value can be set there. "
                "Use reset_state=False (--no-reset-state), or an optimizer with floating-point state."
            )
        others = state_of(optimizer, weight).values()
        factored = not entries and any(isinstance(value, Tensor) and value.numel() > 1 for value in others)
        whole = [name for name, value in entries.items() if not value.is_floating_point()]
        if start == "mean" and (factored or whole):
            what = f"keeps {whole[0]!r} in whole numbers" if whole else "keeps no state of single weights"
            raise RuntimeError(_no_mean(optimizer, what))


def _no_mean(optimizer, what):
    return (
        "reset_state='mean' takes the mean of the optimizer's state over the active weights, and "
        f"{type(optimizer).__name__} {what}. Use SGD, RMSprop or one of the Adam family, or reset_state=True or False."
    )
