"""What always holds between masks, weights and optimizer, and what to do where it does not."""

import math

import torch
from torch import Tensor

from sparselearning.processes import distributed
from sparselearning.processes.sharded import add_up, count_active, is_sharded


class InvariantError(RuntimeError):
    """Masks, weights and optimizer no longer belong together; the message lists what differs and what to do."""


class NonFiniteError(ValueError):
    """A weight, gradient or momentum is NaN or infinite, so that no choice among weights would mean anything."""


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
    """Check that the modules still hold the masked weights, and the masking's optimizer steps them.

    Raises:
        InvariantError: if a weight was replaced, or the optimizer was.
    """
    if problems := _strangers(masking):
        raise InvariantError("\n".join(problems))


def refuse_bad_values(masking) -> None:
    """Check that weights and momenta are finite and no weight was trained unmasked, in one synchronisation if so.

    Raises:
        InvariantError: if a weight has more nonzero entries than active ones; naming the layers.
        NonFiniteError: naming the layers.
    """
    tensors = {}
    for layer in masking.layers:
        state = masking.optimizer.state.get(masking.sparse_training.stepped_for(layer), {})
        momenta = {key: state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in state}
        for kind, tensor in {"weight": layer.master, **momenta}.items():
            if isinstance(tensor, Tensor):
                tensors[layer.name, kind] = tensor
    # The sum of finite numbers may overflow, but it is many times cheaper than looking at each of them.
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors.values()]
    whole = [layer for layer in masking.layers if not is_sharded(layer.master)]
    excess = [(layer.master.count_nonzero() - layer.nonzeros).to(torch.float32) for layer in whole]
    fetched = _fetch(sums + excess)
    unmasked = [layer.name for layer, count in zip(whole, fetched[len(sums) :], strict=True) if count > 0]
    if unmasked:
        raise InvariantError(
            f"More weights are not zero than are active in {', '.join(unmasked)}. Another optimizer than the Masking's "
            "trains them, or something wrote into them: make the Masking with the optimizer that trains, or call "
            "apply_mask() after writing weights."
        )
    if not all(map(math.isfinite, fetched[: len(sums)])):
        _refuse_what_is_not_finite(tensors)


def refuse_bad_gradients(gradients: list[tuple[str, Tensor]]) -> None:
    """Check that gradients, by the layer's name, are finite, in one synchronisation if so.

    Raises:
        NonFiniteError: naming the layers.
    """
    sums = [gradient.sum(dtype=torch.float32) for _, gradient in gradients]
    if sums and not all(map(math.isfinite, _fetch(sums))):
        _refuse_what_is_not_finite({(name, "gradient"): gradient for name, gradient in gradients})


def _refuse_what_is_not_finite(tensors):
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
