"""Values that an update cannot work with: NaN, infinite, or trained without their masks."""

import math
from typing import Any

import torch
from torch import Tensor

from sparselearning.processes.sharded import added_up, fetch, is_sharded, local_part
from sparselearning.weights.optimizer import state_of


class InvariantError(RuntimeError):
    """Masks, weights and optimizer no longer belong together; the message lists what differs and what to do."""


class NonFiniteError(ValueError):
    """A weight, gradient or momentum is NaN or infinite, so that no choice among weights would mean anything."""


def refuse_bad_values(masking: Any) -> None:
    """Check that weights and momenta are finite and no weight was trained unmasked, in one synchronisation if so.

    Raises:
        InvariantError: if a weight has more nonzero entries than active ones; naming the layers.
        NonFiniteError: naming the layers.
    """
    tensors = {}
    for layer in masking.layers:
        state = state_of(masking.optimizer, masking.held.stepped_for(layer))
        momenta = {key: state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in state}
        own = layer.entries.value.detach() if layer.compact else layer.master
        for kind, tensor in {"weight": own, **momenta}.items():
            if isinstance(tensor, Tensor):
                tensors[layer.name, kind] = tensor
    # The sum of finite numbers may overflow, but it is many times cheaper than looking at each of them.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    fetched = fetch(sums + [_excess(layer) for layer in masking.layers])
    unmasked = [layer.name for layer, count in zip(masking.layers, fetched[len(sums) :], strict=True) if count > 0]
    if unmasked:
        raise InvariantError(
            f"More weights are not zero than are active in {', '.join(unmasked)}. Another optimizer than the Masking's "
            "trains them, or something wrote into them: make the Masking with the optimizer that trains, or call "
            "apply_mask() after writing weights."
        )
    if not all(map(math.isfinite, fetched[: len(sums)])):
        _refuse_what_is_not_finite(tensors)


def _excess(layer):
    """Return how many more entries of a weight are nonzero than are active; of a sharded one, part by part."""
    if layer.compact:
        return torch.tensor(0.0 if layer.entries.beyond is None else len(layer.entries.beyond[0]))
    if not is_sharded(layer.master):
        return (layer.master.count_nonzero() - layer.nonzeros).to(torch.float32)
    excess = local_part(layer.master).count_nonzero() - local_part(layer.mask).count_nonzero()
    return added_up(excess.clamp(min=0).to(torch.float32), layer.master)


def refuse_bad_gradients(masking: Any) -> None:
    """Check that the gradients that the functions read are finite, in one synchronisation if so.

    Raises:
        NonFiniteError: naming the layers.
    """
    read = masking._gradients_read
    sums = [gradient.sum(dtype=torch.float32) for _, gradient in read]
    if not all(map(math.isfinite, fetch(sums))):
        names = {id(tensor): layer.name for layer in masking.layers for tensor in (layer.weight, layer.master)}
        _refuse_what_is_not_finite({(names.get(id(w), "a weight"), "gradient"): g for w, g in read})


def _refuse_what_is_not_finite(tensors):
    counts = fetch([(~tensor.isfinite()).sum() for tensor in tensors.values()])
    bad = [f"{kind} of {name}" for (name, kind), count in zip(tensors, counts, strict=True) if count]
    if bad:
        raise NonFiniteError(
            f"NaN or infinite: {', '.join(bad)}. The masks stay as they are. Training has diverged: go back to the "
            "last checkpoint, and lower the learning rate or clip the gradients."
        )
