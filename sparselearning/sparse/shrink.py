"""Remove the channels and neurons that pruning has cut off, without changing what the network computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.sparse.conversion import NORMS, layers_of, pair
from sparselearning.sparse.dataflow import Dataflow

Layer = nn.Linear | nn.Conv2d
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def remove_dead_units(model: nn.Module, example_input: Any) -> tuple[nn.Module, dict[str, int]]:
    """Return a smaller copy of `model`, in eval mode, and the number of units removed from each layer by name.

    A unit (output channel or neuron) goes if all weights into it are zero, after the constant that it gives has been
    added to the biases of the layer that reads it; or if all weights that read it are zero. That is repeated until
    none is left, for removing one unit may cut off another. Outputs stay the same but for rounding.

    Covered are layers that one other layer reads, through modules in between: batch norm, activations, dropout,
    pooling, nn.Flatten. Units that a sum (a residual connection) reads stay, and so do constants other than zero
    before a convolution that pads, for padding is not constant.
    """
    model = nn.Sequential(copy.deepcopy(model).eval())
    flow = Dataflow(model, example_input)
    links = [(name.removeprefix("0."), layer, *follow(layer, flow)) for name, layer in layers_of(model)]
    removed: dict[str, int] = {}
    again = True
    while again:
        again = False
        for name, layer, between, reader in links:
            count = shrink(layer, between, reader) if reader is not None else 0
            if count:
                removed[name] = removed.get(name, 0) + count
                again = True
    return model[0], removed


def follow(layer: Layer, flow: Dataflow) -> tuple[list[nn.Module], Layer | None]:
    """Return the modules between `layer` and the one layer that reads it, and that layer (None if there is none)."""
    between: list[nn.Module] = []
    module = flow.only_reader(layer)
    while module is not None and keeps_channels(module):
        between.append(module)
        module = flow.only_reader(module)
    if not isinstance(module, nn.Linear | nn.Conv2d) or type(module) not in (nn.Linear, nn.Conv2d):
        return between, None
    ungrouped = all(not isinstance(item, nn.Conv2d) or item.groups == 1 for item in (layer, module))
    # A linear layer after a convolution takes each channel's pixels side by side, if nn.Flatten put them there.
    flat = isinstance(layer, nn.Linear) or isinstance(module, nn.Conv2d)
    flat = flat or any(isinstance(item, nn.Flatten) for item in between)
    return between, module if ungrouped and flat else None


def keeps_channels(module: nn.Module) -> bool:
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim == -1
    if isinstance(module, NORMS):
        return module.running_mean is not None
    if isinstance(module, nn.MaxPool2d):
        return not module.return_indices
    if isinstance(module, nn.AvgPool2d):
        return pair(module.padding) == (0, 0)
    return isinstance(module, (*ELEMENTWISE, *POOLS))


@torch.no_grad()
def shrink(layer: Layer, between: list[nn.Module], reader: Layer) -> int:
    """Remove the dead units between `layer` and `reader`; return how many."""
    units = layer.weight.shape[0]
    width = reader.weight.shape[1] // units  # inputs of the reader for each unit
    outgoing = reader.weight.reshape(reader.weight.shape[0], units, -1)
    unread = (outgoing == 0).all(2).all(0)
    constant = (layer.weight.flatten(1) == 0).all(1)
    value = constants(layer, between)
    pads = isinstance(reader, nn.Conv2d) and (reader.padding == "same" or reader.padding not in ("valid", (0, 0)))
    dead = unread | (constant & ((value == 0) | (not pads)))
    dead[: int(dead.all())] = False  # a layer keeps one unit
    if not dead.any():
        return 0
    folded = (outgoing[:, dead].sum(2) * value[dead]).sum(1)
    if folded.any():
        bias = folded if reader.bias is None else reader.bias + folded
        reader.register_parameter("bias", nn.Parameter(bias))
    keep_outputs(layer, ~dead)
    for module in between:
        if isinstance(module, NORMS):
            keep_features(module, ~dead)
    keep_inputs(reader, (~dead).repeat_interleave(width))
    return int(dead.sum())


def constants(layer: Layer, between: list[nn.Module]) -> Tensor:
    """Return what each unit of `layer` would give the reader if its inputs were all zero."""
    value = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.detach().clone()
    for module in between:
        if isinstance(module, nn.BatchNorm2d):
            value = module(value[None, :, None, None]).flatten()
        elif isinstance(module, nn.BatchNorm1d):
            value = module(value[None])[0]
        elif isinstance(module, ELEMENTWISE):
            value = module(value)
    return value


def keep_outputs(layer: Layer, keep: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[keep])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[keep])
    if isinstance(layer, nn.Linear):
        layer.out_features = len(layer.weight)
    else:
        layer.out_channels = len(layer.weight)


def keep_inputs(layer: Layer, keep: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, keep])
    if isinstance(layer, nn.Linear):
        layer.in_features = layer.weight.shape[1]
    else:
        layer.in_channels = layer.weight.shape[1]


def keep_features(norm: nn.BatchNorm1d | nn.BatchNorm2d, keep: Tensor) -> None:
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.dim():
            kept = tensor[keep]
            setattr(norm, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)
    norm.num_features = int(keep.sum())
