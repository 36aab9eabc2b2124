"""Masks of a regular pattern on a GPU, through torch's own sparse tensors."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from sparselearning.sparse.conversion import LayerReport, Report, layers_of

BLOCK = 16
LAYOUTS = ("unstructured", "2:4", "bsr")


def convert_pattern(model: nn.Module, layout: str) -> tuple[nn.Module, Report]:
    """Return a copy of `model`, on a GPU, whose linear layers of pattern `layout` hold torch's sparse tensors.

    '2:4': at most two weights of every four along the input are active (`torch.sparse.to_sparse_semi_structured`);
    'bsr': active weights lie in blocks of 16 x 16, at most half of which are active. Other layers stay dense.

    Raises:
        ValueError: for an unknown layout, a model elsewhere than on a GPU, or a model without such a layer.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Choose from {', '.join(LAYOUTS)}.")
    device = next((p.device.type for p in model.parameters()), "cpu")
    if device != "cuda":
        raise ValueError(
            f"layout={layout!r} needs a model on a GPU, got one on {device!r}. Move it, or use layout='unstructured'."
        )
    model = copy.deepcopy(model).eval()
    pattern = {"2:4": two_of_four, "bsr": blocks}[layout]
    report = Report()
    for name, layer in layers_of(model):
        density = layer.weight.count_nonzero().item() / layer.weight.numel()
        weight = pattern(layer.weight.detach()) if isinstance(layer, nn.Linear) else None
        if weight is not None:
            layer.weight = nn.Parameter(weight, requires_grad=False)
        note = "" if weight is not None else f"not of pattern {layout}"
        report.layers.append(LayerReport(name, density, math.nan, math.nan, weight is not None, note))
    if not any(layer.replaced for layer in report.layers):
        raise ValueError(f"No linear layer has masks of pattern {layout!r}; the model would stay dense.")
    return model, report


def two_of_four(weight: Tensor) -> Tensor | None:
    """Return `weight` as a semi-structured tensor, or None where it is not 2:4."""
    outputs, inputs = weight.shape
    if inputs % 4 or (weight.reshape(outputs, -1, 4) != 0).sum(-1).max() > 2:
        return None
    try:
        return torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError):  # a shape or dtype that this GPU has no 2:4 product for
        return None


def blocks(weight: Tensor) -> Tensor | None:
    """Return `weight` in block-sparse rows, or None where fewer than half of its blocks are empty."""
    if any(size % BLOCK for size in weight.shape):
        return None
    rows, columns = (size // BLOCK for size in weight.shape)
    active = (weight.reshape(rows, BLOCK, columns, BLOCK) != 0).any(3).any(1)
    return None if active.float().mean() > 0.5 else weight.to_sparse_bsr((BLOCK, BLOCK))
