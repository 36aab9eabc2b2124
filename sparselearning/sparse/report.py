"""What `convert` and `remove_dead_units` report, and the layers that they report on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class LayerReport:
    """One layer of a converted model; times in milliseconds for one call, nan where nothing was measured."""

    name: str
    density: float
    dense_ms: float
    sparse_ms: float
    replaced: bool
    note: str = ""


@dataclass
class Report:
    """What `convert` did: every linear and convolution layer, and the whole model before and after.

    `verified` says on what inputs the outputs were compared, or why they were not; `notes` what else stayed as it was.
    """

    layers: list[LayerReport] = field(default_factory=list)
    dense_ms: float = float("nan")
    converted_ms: float = float("nan")
    verified: str = "not verified: nothing was changed"
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'layer':30} {'density':>8} {'dense ms':>9} {'sparse ms':>9}  outcome"]
        for layer in self.layers:
            outcome = ("replaced" if layer.replaced else "kept") + (f": {layer.note}" if layer.note else "")
            times = f"{layer.dense_ms:9.3f} {layer.sparse_ms:9.3f}"
            lines.append(f"{layer.name:30} {layer.density:8.3f} {times}  {outcome}")
        lines.append(f"{'whole model':30} {'':8} {self.dense_ms:9.3f} {self.converted_ms:9.3f}")
        return "\n".join([*lines, self.verified, *self.notes])


class Removed(dict[str, int]):
    """How many units `remove_dead_units` removed, by layer name.

    `verified` says on what inputs the outputs were compared, or why they were not; `notes` what stayed as it was.
    """

    def __init__(self, *args, verified: str = "", notes: tuple[str, ...] = ()):
        super().__init__(*args)
        self.verified = verified
        self.notes = list(notes)


def is_plain(module: nn.Module) -> bool:
    """Return whether nothing but the class of `module` decides what a call of it does."""
    return "forward" not in vars(module) and not any(getattr(module, hooks, None) for hooks in HOOKS)


def why_kept(module: nn.Module) -> str:
    """Return why a linear or convolution layer cannot be replaced, whatever its weight; empty if it can."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"no sparse kernels for a {type(module).__name__}"
    if not is_plain(module):
        return "it has hooks, or a forward of its own"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.layout != torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}"
    return ""


def layers_of(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Return (name, layer) of every plain linear and convolution layer; others may compute something else."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not why_kept(module)
    ]


def others_of(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return (name, module, why) of the linear and convolution layers, and the scripted modules, that stay dense."""
    others: list[tuple[str, nn.Module, str]] = []
    scripted = None
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if scripted is None or not name.startswith(scripted):
                scripted = f"{name}." if name else ""
                others.append((name, module, "a ScriptModule stays as it is"))
        elif isinstance(module, nn.Linear | _ConvNd) and (why := why_kept(module)):
            others.append((name, module, why))
    return others


def density_of(layer: nn.Module) -> float:
    """Return the share of weights that are not zero; nan for a layer without a weight of torch's own."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.layout != torch.strided or not weight.numel():
        return float("nan")
    return weight.detach().count_nonzero().item() / weight.numel()
