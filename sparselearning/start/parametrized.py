"""Weights that are computed from other parameters: parametrizations, weight_norm, spectral_norm, torch's own pruning.

The mask of such a weight lies on what is stored. It does what it says only where zeros stay zeros:

    weight_norm         w = g * v / |v|: v is masked, g is not, and no slice of v is empty, which would be 0 / 0
    spectral_norm       w = v / sigma(v): v is masked
    orthogonal          mixes all entries of v: refused
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from sparselearning.processes.sharded import is_sharded

REFUSED = "refused: "  # begins the reason of a weight that has to be named in dense=[...]
SCALE = "scale of weight_norm"


class Stored(NamedTuple):
    """A parameter that a weight is computed from."""

    module: nn.Module  # which has the weight
    name: str  # of the weight
    parameter: Tensor
    reason: str  # why it cannot be masked, or an empty string
    norm_dim: int | None  # the dimension whose slices weight_norm divides by their norms, -1 for all in one


def stored_weights(module: nn.Module) -> Iterator[Stored]:
    """Yield the parameters that weights in `module` are computed from."""
    for part in module.modules():
        for name, computed in getattr(part, "parametrizations", {}).items():
            if isinstance(computed, ParametrizationList):
                yield from _parametrized(part, name, computed)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield Stored(part, hook.name, getattr(part, f"{hook.name}_g"), SCALE, None)
                dim = -1 if hook.dim is None else hook.dim
                yield Stored(part, hook.name, getattr(part, f"{hook.name}_v"), "", dim)
            elif isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                reason = f"{REFUSED}torch.nn.utils.prune masks it too; call prune.remove(module, {name!r}) first"
                yield Stored(part, name, getattr(part, f"{name}_orig"), reason, None)


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a layer, or what it is computed from; to compute it would move spectral_norm's vectors."""
    computed = getattr(layer, "parametrizations", {})
    if "weight" in computed:
        return list(computed["weight"].parameters(recurse=False))[-1]
    names = [name for name in ("weight", "weight_v", "weight_orig") if name in layer._parameters]
    return getattr(layer, names[0] if names else "weight")


def _parametrized(part, name, computed):
    stored = [parameter for key, parameter in computed.named_parameters(recurse=False) if key.startswith("original")]
    first = computed[0]
    if isinstance(first, _WeightNorm) and len(stored) == 2:
        yield Stored(part, name, stored[0], SCALE, None)
        yield Stored(part, name, stored[1], _reason(computed, stored[1]), first.dim)
        return
    for parameter in stored:
        yield Stored(part, name, parameter, _reason(computed, parameter), None)


def _reason(computed, parameter):
    if keeps_zeros(computed, parameter):
        return ""
    kinds = ", ".join(type(kind).__name__.lstrip("_") for kind in computed)
    return f"{REFUSED}its parametrization {kinds} makes the zeros of a mask other numbers"


@torch.no_grad()
def keeps_zeros(computed: ParametrizationList, parameter: Tensor) -> bool:
    """Tell whether a weight has zeros where `parameter`, one of those it is computed from, has them.

    Tried on a copy, with half of the parameter's entries zero; on the meta device, and of sharded parameters, nothing
    can be known, and the answer is True.
    """
    if parameter.is_meta or is_sharded(parameter) or type(parameter) is not nn.Parameter:
        return True
    probe = copy.deepcopy(computed).eval()
    index = [id(p) for p in computed.parameters()].index(id(parameter))
    mask = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask.to(parameter.device)
    own = [*probe.parameters()][index]
    own.copy_(torch.where(own == 0, 1, own) * mask)
    weight = probe()
    return weight.shape == mask.shape and not weight[~mask].nan_to_num(0).any()
