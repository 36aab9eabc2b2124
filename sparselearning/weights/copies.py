"""Copies of a network: averages, teachers, saved weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.native.zero import zero_inactive
from sparselearning.processes.sharded import placed_like
from sparselearning.start.maskable import canonical_name, named_parameters


@torch.no_grad()
def apply_to(masking: Any, other: nn.Module | Mapping[str, Tensor], module: nn.Module | None = None) -> None:
    """Set the inactive weights of a copy of the network to zero, in place.

        average = torch.optim.swa_utils.AveragedModel(model)
        ...
        masking.apply_to(average)

    An average of masked weights is denser than the network once its masks have moved. Weights are found by their
    names; prefixes of DDP, torch.compile and AveragedModel do not matter.

    Args:
        other: a module with the names and shapes of the masked one, or its state_dict.
        module: which of several masked modules `other` is a copy of.

    Raises:
        ValueError: if `other` lacks a masked weight, or has one of another shape; nothing is changed then.
    """
    module = _only(masking.modules) if module is None else module
    layers, weights = _layers_by_own_name(masking, module), _weights_by_name(other)
    if differing := [name for name, layer in layers.items() if _shape(weights.get(name)) != layer.shape]:
        lines = (f"{name} is {_shape(weights.get(name))}, here {tuple(layers[name].shape)}" for name in differing)
        raise ValueError(
            f"Expected a copy of {type(module).__name__}, got a {type(other).__name__} in which {'; '.join(lines)}. "
            "Pass the module or the state_dict whose weights have the names of the masked ones."
        )
    masks = [placed_like(weights[name], layer.mask) for name, layer in layers.items()]
    zero_inactive([weights[name] for name in layers], masks)


def _only(modules):
    if len(modules) != 1:
        raise ValueError(
            f"This Masking masks {len(modules)} modules. Say which of them the other is a copy of: "
            "apply_to(other, module=...)."
        )
    return modules[0]


def _layers_by_own_name(masking, module):
    layers = {id(layer.weight): layer for layer in masking.layers}
    found = {name: layers[id(weight)] for name, weight in named_parameters(module) if id(weight) in layers}
    if not found:
        raise ValueError(f"This Masking masks no weight of {type(module).__name__}. Call add_module with it before.")
    return found


def _weights_by_name(other):
    if isinstance(other, nn.Module):
        return dict(named_parameters(other))
    return {canonical_name(name): value for name, value in other.items()} | dict(other)


def _shape(weight):
    return tuple(weight.shape) if isinstance(weight, Tensor) else "absent"
