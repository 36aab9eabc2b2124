"""What always holds between masks, weights and optimizer, and what to do where it does not."""

import math

import torch
from torch import Tensor

from sparselearning.sharded import add_up, count_active


class InvariantError(RuntimeError):
    """Masks, weights and optimizer no longer belong together; the message lists what differs and what to do."""


class NonFiniteError(ValueError):
    """A weight or momentum is NaN or infinite, so that no choice among weights would mean anything."""


def check(masking) -> None:
    """Verify everything that `Masking` relies on.

    The number of active weights is what it was at the start; inactive weights are exactly zero; every mask lies
    on the device of its weight; the modules still hold the masked weights, and the optimizer still steps them.

    Raises:
        InvariantError: with one line per violation.
    """
    owned = {id(parameter) for module in masking.modules for parameter in module.parameters()}
    stepped = {id(parameter) for group in masking.optimizer.param_groups for parameter in group["params"]}
    stepped |= masking.sparse_training.stepped_weights()
    problems = [problem for layer in masking.layers for problem in _problems(layer, owned, stepped)]
    active = sum(int(count_active(layer.mask)) for layer in masking.layers)
    if active != masking.baseline_nonzero - sum(layer.left_over for layer in masking.layers):
        problems.append(
            f"{active} weights are active, {masking.baseline_nonzero} should be. A prune or grow function did not do "
            "what it was asked, or a mask was edited; the next update of the masks makes up for it."
        )
    if problems:
        raise InvariantError("\n".join(problems))


def refuse_non_finite(masking) -> None:
    """Check that weights and momenta are finite, in one synchronisation where they are.

    Raises:
        NonFiniteError: naming the layers.
    """
    tensors = {}
    for layer in masking.layers:
        state = masking.optimizer.state.get(layer.master, {})
        momenta = {key: state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in state}
        for kind, tensor in {"weight": layer.master, **momenta}.items():
            if isinstance(tensor, Tensor):
                tensors[layer.name, kind] = tensor
    if not tensors:
        return
    # The sum of finite numbers may overflow, but it is many times cheaper than looking at each of them.
    if all(map(math.isfinite, _fetch([tensor.sum(dtype=torch.float32) for tensor in tensors.values()]))):
        return
    counts = _fetch([(~tensor.isfinite()).sum() for tensor in tensors.values()])
    bad = [f"{kind} of {name}" for (name, kind), count in zip(tensors, counts, strict=True) if count]
    if bad:
        raise NonFiniteError(
            f"NaN or infinite: {', '.join(bad)}. The masks stay as they are. Training has diverged: go back to the "
            "last checkpoint, and lower the learning rate or clip the gradients."
        )


def _fetch(numbers):
    """Return 0-d tensors as numbers, in one synchronisation; those of sharded weights added up over processes."""
    numbers = add_up(numbers)
    return torch.stack([number.to(numbers[0].device) for number in numbers]).tolist()


def _problems(layer, owned, stepped):
    if id(layer.weight) not in owned:
        yield (
            f"{layer.name}: the module holds another parameter now, which is not masked. Replace parameters before "
            "add_module, or make a new Masking."
        )
    if id(layer.master) not in stepped:
        yield f"{layer.name}: the optimizer does not step it. Make the Masking with the optimizer that trains it."
    if layer.mask.device != layer.weight.device:
        yield (
            f"{layer.name}: the weight is on {layer.weight.device}, its mask on {layer.mask.device}. "
            "Call apply_mask() after moving the model."
        )
    elif (layer.weight.masked_fill(layer.mask, 0) != 0).any():
        yield f"{layer.name}: inactive weights are not zero. Call apply_mask() after writing weights."
