"""What training starts with: the layers of a module that get masks, and which of their weights are active first."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.layers import Budget, SparseLayer
from sparselearning.patterns import pattern_of, patterns_for
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.maskable import UNKNOWN, judge, maskable_parameters, usual_exceptions
from sparselearning.start.masks import Density, SparseInit, initial_masks, masks_of_nonzeros
from sparselearning.start.names import by_density, named
from sparselearning.start.parametrized import REFUSED
from sparselearning.start.scores import SCORES, Batches, scores_of

logger = logging.getLogger(__name__)

Reasons = dict[str, tuple[nn.Parameter, str]]


def new_layers(
    masking: Any,
    module: nn.Module,
    skip: tuple[str, ...],
    sparse_embeddings: bool,
    dense: Iterable[str],
    pattern: str | None,
    sparse: Iterable[str] = (),
) -> tuple[dict[str, SparseLayer], Reasons]:
    """Return the layers to be masked, by the names that weights have in their module, and why the others stay dense.

    The masks are empty yet. The others are given as name -> (parameter, reason).

    Raises:
        ValueError: if no weight can be masked, or a pattern does not fit one.
    """
    known = {id(layer.weight) for layer in masking.layers}
    stepped = {id(parameter) for group in masking.optimizer.param_groups for parameter in group["params"]}
    taken, layers = set(masking.masks), {}
    judged = {found.name: found for found in judge(module, sparse_embeddings, sparse)}
    kept = {name: (found.parameter, found.reason) for name, found in judged.items() if found.reason}
    weights = {name: found.parameter for name, found in judged.items() if not found.reason}
    refused = {name: found for name, found in judged.items() if found.reason.startswith(REFUSED)}
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
            kept[own_name] = (weight, "named to stay dense")
            continue
        while name in taken:  # a second module may use the names of the first
            name = f"{len(masking.modules)}.{name}"
        taken.add(name)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        found = judged[own_name]
        layers[own_name] = SparseLayer(name, weight, master, mask, mask.clone(), orientation=found.orientation)
        layers[own_name].norm_dim, layers[own_name].budget = found.norm_dim, masking.common
    if not layers:
        raise ValueError(
            f"{type(masking.optimizer).__name__} steps no weight of {type(module).__name__} that could be masked "
            f"and is not yet. Build the optimizer from the module's parameters, and add the module once.{_hint(kept)}"
        )
    kept = {name: kept[name] for name in judged if name in kept}
    shapes = {name: layer.mask.shape for name, layer in layers.items()}
    for name, kind in patterns_for(pattern, shapes, _orientations(layers)).items():
        layers[name].pattern = kind
    if hint := _hint(kept):
        logger.warning("%s", hint.strip())
    return layers, kept


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


def set_budgets(masking: Any, new: Mapping[str, SparseLayer], density: Density) -> None:
    """Give the layers of each pattern of {pattern: density} a budget; where it is a number they keep the network's.

    Raises:
        ValueError: for densities that do not fit the names (see `names.by_density`).
    """
    threshold = masking.prune_threshold
    for pattern, _, names in by_density(list(new), density) if isinstance(density, Mapping) else ():
        budget = Budget(pattern, prune_threshold=threshold)
        for name in names:
            new[name].budget = budget


def choose(
    new: Mapping[str, SparseLayer],
    module: nn.Module,
    density: Density,
    sparse_init: SparseInit,
    batches: Batches | None,
) -> None:
    """Make the first weights of new layers active."""
    if sparse_init == "resume":
        weights, empty = ({name: getattr(layer, part) for name, layer in new.items()} for part in ("master", "mask"))
        sparse_init = masks_of_nonzeros(weights, empty, density)
    elif isinstance(sparse_init, str) and sparse_init in SCORES:
        others = [name for name, _ in maskable_parameters(module) if name not in new]
        sparse_init = scores_of(sparse_init, module, batches, density, others, sparse=list(new))
    if isinstance(sparse_init, Mapping) and distributed.in_process_group():
        sparse_init = {name: _from_first_process(tensor) for name, tensor in sparse_init.items()}
    empty = {name: layer.mask for name, layer in new.items()}
    norm_dims = {name: layer.norm_dim for name, layer in new.items() if layer.norm_dim is not None}
    masks = initial_masks(empty, density, sparse_init, _orientations(new), norm_dims)
    for name, layer in new.items():
        layer.mask.copy_(masks[name])
        layer.pattern = pattern_of(masks[name])


def _from_first_process(scores: Tensor) -> Tensor:
    """Return the scores of the first process: each computed them on data of its own. Masks are sent later."""
    if scores.dtype == torch.bool or is_sharded(scores):
        return scores
    return distributed.send_to_all(scores.detach().clone(memory_format=torch.contiguous_format))
