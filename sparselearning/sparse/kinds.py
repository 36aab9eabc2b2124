"""Which layers train on their active weights, and why others cannot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from sparselearning.layer import SparseLayer
from sparselearning.sparse.held import Place
from sparselearning.sparse.interface import DTYPES
from sparselearning.sparse.trained import Trained, TrainedLinear, TrainedProjection
from sparselearning.sparse.trained_attention import TrainedAttention
from sparselearning.sparse.trained_columns import columns_of
from sparselearning.sparse.trained_conv import TrainedConv1d, TrainedConv2d

KINDS: dict[type[nn.Module], type[Trained]] = {
    kind.plain: kind for kind in (TrainedLinear, TrainedProjection, TrainedConv1d, TrainedConv2d, TrainedAttention)
}


def kind_of(module: nn.Module) -> type[Trained] | None:
    """Return the class that a module becomes, or is, to train on its active weights; None if there is none."""
    if isinstance(module, Trained):
        return type(module)
    # A model with such layers has imported it; transformers is no dependency.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and type(module) is transformers.Conv1D:
        return columns_of(type(module))
    return KINDS.get(type(module))


def places_of(module: nn.Module) -> dict[int, list[Place]]:
    """Return the id of each parameter -> the modules inside `module` that hold it directly, and their names of it."""
    places: dict[int, list[Place]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((part, name))
    return places


def why_not(layer: SparseLayer, places: Sequence[Place]) -> str:
    """Return why a weight cannot be trained on the kernels, or nothing if it can."""
    weight = layer.weight
    if weight.device.type not in ("cpu", "meta") or weight.dtype not in DTYPES:
        return f"no kernels for {weight.dtype} on {weight.device.type}"
    if weight is not layer.master:
        return "it is a copy"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "hooks read its gradient"
    for module, name in places:
        kind = kind_of(module)
        if kind is None:
            name = type(module).__name__
            return f"it belongs to {'an' if name[0] in 'AEIOU' else 'a'} {name}"
        if name not in kind.names:
            return f"no kernel multiplies with {name} of a {type(module).__name__}"
    return why_not_alike(places)


def why_not_alike(places: Sequence[Place]) -> str:
    """Return why modules that multiply with one weight cannot share its values, or nothing if they can."""
    layouts = []
    for module, _ in places:
        kind = kind_of(module)
        assert kind is not None
        try:
            layouts.append((kind.as_convolution, kind.geometry(module)))  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            return str(error).rstrip(".")
    if len({id(module) for module, _ in places}) < len(places):
        return "it is tied inside of a module"
    if any(layout != layouts[0] for layout in layouts):
        return "it is tied, and its layers multiply with it in different ways"
    return ""
