"""Whether the functions of a Masking, and its density schedule, can keep the patterns of layers and compare them."""

from collections.abc import Sequence
from typing import Any

from sparselearning.budgets import layers_of
from sparselearning.functions import is_marked, surely_reads
from sparselearning.patterns import UNSTRUCTURED
from sparselearning.processes.sharded import is_sharded
from sparselearning.weights.together import members_of


def check_fit(masking: Any, layers: Sequence[Any]) -> None:
    """Check that the functions and the density schedule can keep the patterns of these layers, and compare them.

    Raises:
        ValueError: if they cannot.
    """
    _check_slices(masking, layers)
    _check_patterns_fit(masking, layers)
    _check_comparable(masking, layers)


def _check_comparable(masking, layers):
    """Check that functions which compare momenta of layers compare those of one kind of optimizer."""
    compared = [] if is_marked(masking.measure, "gives_back") else [masking.measure]
    compared += [function for function in (masking.prune, masking.grow) if is_marked(function, "network_wide")]
    members = members_of(masking.optimizer)
    if len(members) == 1 or not any(surely_reads(function, "momentum") for function in compared):
        return
    kinds = {id(w): type(member).__name__ for member in members for g in member.param_groups for w in g["params"]}
    for budget in {layer.budget: None for layer in layers}:
        found = sorted({kinds[id(layer.master)] for layer in layers_of(budget, layers)})
        if len(found) > 1:
            raise ValueError(
                f"The momenta of {' and '.join(found)} have different units, and "
                f"redistribution_mode={masking.redistribution_mode!r} or growth_mode={masking.growth_mode!r} compares "
                "them. Give the weights of each optimizer a density of their own, density={pattern: ...}, or use "
                "redistribution_mode='magnitude', 'nonzeros' or 'none', and growth layer by layer."
            )


def _check_patterns_fit(masking, layers):
    """Check that the functions and the density schedule can keep the patterns of these layers."""
    patterned = [layer for layer in layers if layer.pattern != UNSTRUCTURED]
    if not patterned:
        return
    name = patterned[0].pattern.name
    if any(is_sharded(layer.mask) for layer in layers):
        raise ValueError(f"The pattern {name!r} needs whole weights, got sharded ones. Use DistributedDataParallel.")
    # A schedule of the network divides its weights among all layers; else they move within budgets.
    groups = [layers_of(budget, layers) for budget in {layer.budget: None for layer in layers}]
    groups = [layers] if callable(masking.updates.density) else groups
    sizes = max((sorted({layer.pattern.size for layer in group}) for group in groups), key=len)
    in_prune, in_grow = (is_marked(function, "single_weights") for function in (masking.prune, masking.grow))
    if in_grow or (in_prune and any(layer.pattern.size > 1 for layer in layers)):
        mode = f"growth_mode={masking.growth_mode!r}" if in_grow else f"prune_mode={masking.prune_mode!r}"
        raise ValueError(f"{mode} moves single weights, and the pattern {name!r} does not let it. Choose another.")
    even = [layer.pattern.even for layer in layers]
    if masking.updates.density is not None and (len(sizes) > 1 or any(even)):
        raise ValueError(f"The pattern {name!r} keeps the density of each layer; leave out the density schedule.")
    across = not is_marked(masking.measure, "gives_back")
    across |= is_marked(masking.prune, "network_wide") or is_marked(masking.grow, "network_wide")
    if len(sizes) > 1 and across:
        raise ValueError(
            f"The units of pattern {name!r} have {', '.join(map(str, sizes))} weights in different layers, so none "
            "can move from one layer to another. Use redistribution_mode='none', and prune and grow layer by layer."
        )
    if across and any(any(layer.pattern.even for layer in g) != all(layer.pattern.even for layer in g) for g in groups):
        raise ValueError(
            "Layers of constant fan-in keep their numbers of weights, and others would exchange weights with them. Use "
            "redistribution_mode='none', and prune and grow layer by layer; or give them densities of their own."
        )


def _check_slices(masking, layers):
    """Check that slices which weight_norm divides by their norms can be kept from being empty."""
    layers = [layer for layer in layers if layer.norm_dim is not None]
    shrunk = masking.held.kind == "soft"
    if unfit := [x.name for x in layers if shrunk or is_sharded(x.mask) or x.pattern.name != "unstructured"]:
        raise ValueError(
            f"weight_norm divides by the norms of slices of {', '.join(unfit)}, which would become empty with "
            "weights='soft', a pattern, or sharded weights. Leave these out, or name the layers in dense=[...]."
        )
