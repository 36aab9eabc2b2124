"""What training starts with: the layers of a module that get masks, and which of their weights are active first."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning import loading
from sparselearning.budgets import Budget
from sparselearning.compact import expanded, is_compact, position_of
from sparselearning.invariants import stepped_by
from sparselearning.layer import SparseLayer
from sparselearning.patterns import pattern_of, patterns_for
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.drawing import initial_positions
from sparselearning.start.maskable import UNKNOWN, judge, maskable_parameters, output_weights, usual_exceptions
from sparselearning.start.masks import MAGNITUDE, RECEPTIVE, Density, SparseInit, initial_masks, masks_of_nonzeros
from sparselearning.start.names import by_density, named
from sparselearning.start.parametrized import REFUSED
from sparselearning.start.receptive import receptive_scores
from sparselearning.start.scores import SCORES, Batches, scores_of

logger = logging.getLogger(__name__)

NAMED = "named to stay dense"
Reasons = dict[str, tuple[nn.Parameter, str]]


def new_layers(
    masking: Any,
    module: nn.Module,
    skip: str | Iterable[str],
    sparse_embeddings: bool,
    dense: Iterable[str],
    pattern: str | Mapping[str, str] | None,
    sparse: Iterable[str] = (),
) -> tuple[dict[str, SparseLayer], Reasons]:
    """Return the layers to be masked, by the names that weights have in their module, and why the others stay dense.

    The masks are empty yet. The others are given as name -> (parameter, reason).

    Raises:
        ValueError: if no weight can be masked, or a pattern does not fit one.
    """
    known = {id(layer.weight) for layer in masking.layers}
    stepped = stepped_by(masking.optimizer)
    taken, layers = set(masking.densities), {}
    judged = {found.name: found for found in judge(module, sparse_embeddings, sparse)}
    kept = {name: (found.parameter, found.reason) for name, found in judged.items() if found.reason}
    weights = {name: found.parameter for name, found in judged.items() if not found.reason}
    refused = {name: found for name, found in judged.items() if found.reason.startswith(REFUSED)}
    skip = {skip} if isinstance(skip, str) else set(skip)
    parts = [part for part in skip if part not in weights]
    could_be = [name for name in judged if name in weights or name in refused]
    named_dense = {*skip, *named(could_be, dense, usual_exceptions(module))}
    _refuse([found for name, found in refused.items() if not _stays_dense(name, named_dense, parts)])
    for own_name, weight in weights.items():
        name, master = own_name, masking.master_of(weight)
        if id(weight) in known:
            continue
        if id(master) not in stepped:
            kept[own_name] = (weight, "the optimizer does not step it")
            continue
        if _stays_dense(own_name, named_dense, parts):
            kept[own_name] = (weight, NAMED)
            continue
        while name in taken:  # a second module may use the names of the first
            name = f"{len(masking.modules)}.{name}"
        taken.add(name)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        found = judged[own_name]
        layers[own_name] = SparseLayer(name, weight, master, mask, mask.clone(), orientation=found.orientation)
        layers[own_name].norm_dim, layers[own_name].budget = found.norm_dim, masking.common
    if not layers:
        raise ValueError(_nothing_to_mask(masking, module, weights, kept))
    kept = {name: kept[name] for name in judged if name in kept}
    shapes = {name: layer.shape for name, layer in layers.items()}
    last = {id(weight) for weight in output_weights(module)}
    outputs = [name for name, layer in layers.items() if id(layer.weight) in last]
    for name, kind in patterns_for(pattern, shapes, _orientations(layers), outputs).items():
        layers[name].pattern = kind
    if hint := _hint(kept):
        logger.warning("%s", hint.strip())
    return layers, kept


def _nothing_to_mask(masking, module, weights, kept):
    if weights and all(kept.get(name, (None, ""))[1] == NAMED for name in weights):
        return (
            f"All weights of {type(module).__name__} that could be masked are named to stay dense: "
            f"{', '.join(weights)}. Name fewer in dense=[...]; sparse_init='uniform' keeps the first one dense."
        )
    return (
        f"{type(masking.optimizer).__name__} steps no weight of {type(module).__name__} that could be masked "
        f"and is not yet. Build the optimizer from the module's parameters, and add the module once."
        f"{_frozen_beside_adapters(kept)}{_hint(kept)}"
    )


def _stays_dense(name, named_dense, parts):
    return name in named_dense or any(part in name for part in parts)


def _refuse(found):
    if found:
        reasons = "; ".join(f"{each.name}, {each.reason.removeprefix(REFUSED)}" for each in found)
        raise ValueError(f"These weights cannot be masked: {reasons}. Or name what is to stay dense in dense=[...].")


def _orientations(layers):
    return {name: layer.orientation for name, layer in layers.items()}


def _hint(kept):
    """Return a sentence on large parameters that stay dense because nobody knows whether they are weights."""
    unknown = [name for name, (_, reason) in kept.items() if reason == UNKNOWN]
    if not unknown:
        return ""
    return f" Dense stay {', '.join(unknown)}: {UNKNOWN}. To mask them, name them in sparse=[...]."


def _frozen_beside_adapters(kept):
    """Return a sentence on a model whose weights are frozen while adapters train, as that of peft."""
    reasons = {reason for _, reason in kept.values()}
    if not {"frozen", "adapter"} <= reasons:
        return ""
    return (
        " Its weights are frozen, and its adapters stay dense: name them in sparse=['*lora_A*'] to mask them, or mask "
        "the model before it gets adapters."
    )


def set_budgets(
    masking: Any, new: Mapping[str, SparseLayer], density: Density | None, state: dict[str, Any] | None
) -> None:
    """Give the layers of each pattern of {pattern: density} a budget; where it is a number they keep the network's.


    Raises:
        ValueError: for densities that do not fit the names (see `names.by_density`), or the saved state.
    """
    if state is not None and state.get("budgets") and not isinstance(density, Mapping):
        raise ValueError(
            "The state was saved with densities by pattern, whose layers exchange no weights. Give these beside it: "
            "add_module(module, density={pattern: density}, state=state)."
        )
    threshold = masking.prune_threshold
    for pattern, _, names in by_density(list(new), density) if isinstance(density, Mapping) else ():
        budget = Budget(pattern, prune_threshold=threshold)
        for name in names:
            new[name].budget = budget


def choose(
    new: Mapping[str, SparseLayer],
    module: nn.Module,
    density: Density | None,
    sparse_init: SparseInit,
    batches: Batches | None,
    state: dict[str, Any] | None = None,
) -> None:
    """Make the first weights of new layers active; those of a saved state, if there is one.

    Raises:
        ValueError: as `masks.initial_masks`, and if there is neither a density nor a state.
        RuntimeError: if the state is of other layers.
    """
    if state is not None:
        density, sparse_init = 1.0, _saved_masks(new, state)
    if density is None:
        raise ValueError("Expected a density in (0, 1], got None. It can be left out beside a saved state alone.")
    if any(layer.weight.is_meta for layer in new.values()):
        _choose_places(new, density, sparse_init, state)
        return
    if sparse_init == "resume":
        weights, empty = ({name: getattr(layer, part) for name, layer in new.items()} for part in ("master", "mask"))
        sparse_init = masks_of_nonzeros(weights, empty, density)
    elif isinstance(sparse_init, str) and sparse_init in SCORES:
        others = [name for name, _ in maskable_parameters(module) if name not in new]
        sparse_init = scores_of(sparse_init, module, batches, density, others, sparse=list(new))
    if isinstance(sparse_init, Mapping) and distributed.in_process_group():
        sparse_init = {name: _from_first_process(tensor) for name, tensor in sparse_init.items()}
    magnitudes = None
    if isinstance(sparse_init, str) and sparse_init in MAGNITUDE:
        magnitudes = {name: layer.master.detach().abs() for name, layer in new.items()}
        sparse_init = MAGNITUDE[sparse_init]
    elif isinstance(sparse_init, str) and sparse_init in RECEPTIVE:
        magnitudes = {name: receptive_scores(layer) for name, layer in new.items()}
        sparse_init = RECEPTIVE[sparse_init]
    empty = {name: layer.mask for name, layer in new.items()}
    norm_dims = {name: layer.norm_dim for name, layer in new.items() if layer.norm_dim is not None}
    masks = initial_masks(empty, density, sparse_init, _orientations(new), norm_dims, magnitudes)
    for name, layer in new.items():
        layer.mask.copy_(masks[name])
        layer.pattern = pattern_of(masks[name])


def _choose_places(new, density, sparse_init, saved):
    """Say where the first active weights of layers are some of which have no values, and no masks."""
    if saved is not None:
        places = {name: position_of(mask) if is_compact(mask) else mask.flatten().nonzero().flatten()
                  for name, mask in sparse_init.items()}  # fmt: skip
    else:
        shapes, patterns = ({name: getattr(layer, key) for name, layer in new.items()} for key in ("shape", "pattern"))
        norm_dims = {name: layer.norm_dim for name, layer in new.items() if layer.norm_dim is not None}
        places = initial_positions(shapes, density, sparse_init, _orientations(new), patterns, norm_dims)
    for name, layer in new.items():
        distributed.send_to_all(places[name])
        if layer.weight.is_meta:
            layer.start_places = places[name]
        else:
            layer.mask.view(-1)[places[name]] = True


def _saved_masks(new, state):
    loading.check_entries("'mask'", state, [*loading.OF_ALL, *loading.OF_MASKING], ["sparse_training", "budgets"])
    names = {layer.name for layer in new.values()}
    loading.check_layers(list(new.values()), {name: entry for name, entry in state["layers"].items() if name in names})
    masks = {name: (state["layers"][layer.name]["mask"], layer.weight.is_meta) for name, layer in new.items()}
    return {name: mask if is_meta else expanded(mask) for name, (mask, is_meta) in masks.items()}


def _from_first_process(scores: Tensor) -> Tensor:
    """Return the scores of the first process: each computed them on data of its own. Masks are sent later."""
    if scores.dtype == torch.bool or is_sharded(scores):
        return scores
    return distributed.send_to_all(scores.detach().clone(memory_format=torch.contiguous_format))
