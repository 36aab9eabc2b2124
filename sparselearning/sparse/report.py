"""What `convert` reports, and the layers that it reports on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


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
    """What `convert` did: every linear and convolution layer, and the whole model before and after."""

    layers: list[LayerReport] = field(default_factory=list)
    dense_ms: float = float("nan")
    converted_ms: float = float("nan")

    def __str__(self) -> str:
        lines = [f"{'layer':30} {'density':>8} {'dense ms':>9} {'sparse ms':>9}  outcome"]
        for layer in self.layers:
            outcome = "replaced" if layer.replaced else "kept" + (f": {layer.note}" if layer.note else "")
            times = f"{layer.dense_ms:9.3f} {layer.sparse_ms:9.3f}"
            lines.append(f"{layer.name:30} {layer.density:8.3f} {times}  {outcome}")
        lines.append(f"{'whole model':30} {'':8} {self.dense_ms:9.3f} {self.converted_ms:9.3f}")
        return "\n".join(lines)


def layers_of(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Return (name, layer) of every plain linear and convolution layer; subclasses may compute something else."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and type(module) in (nn.Linear, nn.Conv2d)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    ]
