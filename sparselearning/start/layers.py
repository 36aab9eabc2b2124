"""What training starts with: the layers of a module that get masks, and which of their weights are active first."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.layers import SparseLayer
from sparselearning.patterns import pattern_of, patterns_for
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded
from sparselearning.start.maskable import dense_parameters, maskable_parameters, named_parameters
from sparselearning.start.masks import Density, SparseInit, initial_masks, masks_of_nonzeros
from sparselearning.start.names import named
from sparselearning.start.scores import SCORES, Batches, scores_of

Reasons = dict[str, tuple[nn.Parameter, str]]


def new_layers(
    masking: Any,
    module: nn.Module,
    skip: tuple[str, ...],
    sparse_embeddings: bool,
    dense: Iterable[str],
    pattern: str | None,
) -> tuple[dict[str, SparseLayer], Reasons]:
    """Return the layers to be masked, by the names that weights have in their module, and why the others stay dense.

    The masks are empty yet. The others are given as name -> (parameter, reason).

    Raises:
        ValueError: if no weight can be masked, or a pattern does not fit one.
    """
    known = {id(layer.weight) for layer in masking.layers}
    stepped = {id(parameter) for group in masking.optimizer.param_groups for parameter in group["params"]}
    taken, layers = set(masking.masks), {}
    kept = {name: (weight, why) for name, weight, why in dense_parameters(module, sparse_embeddings=sparse_embeddings)}
    weights = dict(maskable_parameters(module, sparse_embeddings=sparse_embeddings))
    parts = [part for part in skip if part not in weights]
    named_dense = {*skip, *named(list(weights), dense)}
    for own_name, weight in weights.items():
        name, master = own_name, masking.master_of(weight)
        if id(weight) in known:
            continue
        if id(master) not in stepped:
            kept[own_name] = (weight, "the optimizer does not step it")
            continue
        if own_name in named_dense or any(part in own_name for part in parts):
            kept[own_name] = (weight, "named to stay dense")
            continue
        while name in taken:  # a second module may use the names of the first
            name = f"{len(masking.modules)}.{name}"
        taken.add(name)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        layers[own_name] = SparseLayer(name, weight, master, mask, mask.clone())
    if not layers:
        raise ValueError(
            f"{type(masking.optimizer).__name__} steps no weight of {type(module).__name__} that could be masked "
            "and is not yet. Build the optimizer from the module's parameters, and add the module once."
        )
    kept = {name: kept[name] for name, _ in named_parameters(module) if name in kept}
    for name, kind in patterns_for(pattern, {name: layer.mask.shape for name, layer in layers.items()}).items():
        layers[name].pattern = kind
    return layers, kept


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
        sparse_init = scores_of(sparse_init, module, batches, density, others)
    if isinstance(sparse_init, Mapping) and distributed.in_process_group():
        sparse_init = {name: _from_first_process(tensor) for name, tensor in sparse_init.items()}
    masks = initial_masks({name: layer.mask for name, layer in new.items()}, density, sparse_init)
    for name, layer in new.items():
        layer.mask.copy_(masks[name])
        layer.pattern = pattern_of(masks[name])


def _from_first_process(scores: Tensor) -> Tensor:
    """Return the scores of the first process: each computed them on data of its own. Masks are sent later."""
    if scores.dtype == torch.bool or is_sharded(scores):
        return scores
    return distributed.send_to_all(scores.detach().clone(memory_format=torch.contiguous_format))
