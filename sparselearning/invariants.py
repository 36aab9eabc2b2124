"""What always holds between masks, weights and optimizer, and what to do where it does not."""

import math

import torch
from torch import Tensor

from sparselearning import distributed
from sparselearning.sharded import add_up, count_active, is_sharded


class InvariantError(RuntimeError):
    """Masks, weights and optimizer no longer belong together; the message lists what differs and what to do."""


class NonFiniteError(ValueError):
    """A weight or momentum is NaN or infinite, so that no choice among weights would mean anything."""


def check(masking) -> None:
    """Verify everything that `Masking` relies on.

    The number of active weights is what it was at the start; inactive weights are exactly zero; every mask lies
    on the device of its weight; the modules still hold the masked weights, and the optimizer still steps them. Where
    several processes train together all call it, and their masks are the same.

    Raises:
        InvariantError: with one line per violation.
        ProcessError: if masks of processes differ.
    """
    if distributed.in_process_group():
        distributed.check_agreement([layer.mask for layer in masking.layers])
    problems = [*_strangers(masking), *(problem for layer in masking.layers for problem in _problems(layer))]
    expected = masking.baseline_nonzero - sum(layer.left_over for layer in masking.layers)
    in_place = all(layer.mask.device == layer.weight.device for layer in masking.layers)
    active = sum(int(count_active(layer.mask)) for layer in masking.layers) if in_place else expected
    if active != expected:
        problems.append(
            f"{active} weights are active, {expected} should be. A prune or grow function did not do "
            "what it was asked, or a mask was edited; the next update of the masks makes up for it."
        )
    if problems:
        raise InvariantError("\n".join(problems))


def refuse_strangers(masking) -> None:
    """Check that what the masks hold is what is trained: the modules' weights, stepped by the masking's optimizer.

    Raises:
        InvariantError: if a weight was replaced, or has more nonzero entries than active ones.
    """
    problems = _strangers(masking)
    whole = [layer for layer in masking.layers if not is_sharded(layer.weight) and layer.weight.device.type != "meta"]
    counts = _fetch([layer.master.count_nonzero() for layer in whole]) if whole else []
    problems += [
        f"{layer.name}: {int(count)} weights are not zero, and {layer.nonzeros} active. Another optimizer than the "
        "Masking's trains it, or something wrote into it: make the Masking with the optimizer that trains, or call "
        "apply_mask() after writing weights."
        for layer, count in zip(whole, counts, strict=True)
        if count > layer.nonzeros
    ]
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


def _strangers(masking):
    """Return what is wrong with who owns and who steps the weights."""
    owned = {id(parameter) for module in masking.modules for parameter in module.parameters()}
    stepped = {id(parameter) for group in masking.optimizer.param_groups for parameter in group["params"]}
    stepped |= masking.sparse_training.stepped_weights()
    replaced = "the module holds another parameter now, which is not masked. Replace parameters before add_module, or "
    problems = [
        f"{layer.name}: {replaced}make a new Masking." for layer in masking.layers if id(layer.weight) not in owned
    ]
    return problems + [
        f"{layer.name}: the optimizer does not step it. Make the Masking with the optimizer that trains it."
        for layer in masking.layers
        if id(layer.master) not in stepped
    ]


def _problems(layer):
    if layer.mask.device != layer.weight.device:
        yield (
            f"{layer.name}: the weight is on {layer.weight.device}, its mask on {layer.mask.device}. "
            "Call apply_mask() after moving the model."
        )
    elif (layer.weight.masked_fill(layer.mask, 0) != 0).any():
        yield f"{layer.name}: inactive weights are not zero. Call apply_mask() after writing weights."
