"""The momentum of a weight, from any optimizer's state."""

from typing import Any

import torch
from torch import Tensor


def momentum_of(optimizer: torch.optim.Optimizer, weight: Tensor) -> Tensor:
    """Return the running direction of `weight`'s updates, a tensor of its shape.

    Read by state key, so that any optimizer serves that names its state as torch does. SGD, RMSprop and
    Muon keep `momentum_buffer`; the Adam family keeps m and v, whose ratio m / (sqrt(v) + 1e-8) is the
    direction of its step (Adamax: m / (u + 1e-8)); Lion and others keep `exp_avg` alone. A weight that has
    not been stepped yet has momentum zero, as in the optimizer itself.

    Raises:
        RuntimeError: if the optimizer keeps no momentum.
    """
    state = optimizer.state.get(weight, {})
    momentum = state.get("momentum_buffer")
    if momentum is not None:
        return momentum
    if "exp_avg" in state:
        mean = state["exp_avg"]
        # In half precision 1e-8 is zero.
        precision = torch.promote_types(mean.dtype, torch.float32)
        if "exp_avg_sq" in state:
            return mean / (state["exp_avg_sq"].to(precision).sqrt() + 1e-8)
        if "exp_inf" in state:
            return mean / (state["exp_inf"].to(precision) + 1e-8)
        return mean
    if state or not keeps_momentum(optimizer):
        raise RuntimeError(_no_momentum(optimizer, weight))
    return torch.zeros_like(weight)


def keeps_momentum(optimizer: torch.optim.Optimizer, required: bool = False) -> bool:
    """Tell whether the optimizer's settings promise a momentum; unknown settings count as a promise.

    Raises:
        RuntimeError: if there is none and it is `required`.
    """
    promised = not isinstance(optimizer, WITHOUT_MOMENTUM) and all(
        "betas" in group or group.get("momentum", 1) > 0 for group in optimizer.param_groups
    )
    if required and not promised:
        raise RuntimeError(_no_momentum(optimizer, optimizer.param_groups[0]["params"][0]))
    return promised


WITHOUT_MOMENTUM = (
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.ASGD,
    torch.optim.LBFGS,
    torch.optim.Rprop,
)


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside `optimizer`: itself, or what a wrapper holds as `.optimizer`.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    # Also where the wrapper is an Optimizer itself: Accelerate's runs no hooks of its own.
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"Expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    return inner


def master_weights(optimizer: Any, required: bool = False) -> dict[Tensor, Tensor]:
    """Return each fp16 weight -> the fp32 copy that is stepped in its place.

    Read from the public interface of Apex's FP16_Optimizer; empty for other optimizers.

    Raises:
        RuntimeError: if there are none and they are `required`.
    """
    fp16_groups = getattr(optimizer, "fp16_groups", [])
    fp32_groups = getattr(optimizer, "fp32_from_fp16_groups", [])
    if required and not fp16_groups:
        raise RuntimeError(
            f"fp16=True expects an optimizer with fp32 master weights (Apex's FP16_Optimizer), got "
            f"{type(optimizer).__name__}. With torch.amp the weights are fp32 already: leave fp16=False."
        )
    return {
        half: master
        for halves, masters in zip(fp16_groups, fp32_groups, strict=True)
        for half, master in zip(halves, masters, strict=True)
    }


def _no_momentum(optimizer, weight):
    return (
        f"{type(optimizer).__name__} holds no momentum for a weight of shape {tuple(weight.shape)}. "
        "Use SGD(momentum=0.9), Adam or AdamW, or growth_mode='random' and redistribution_mode='nonzeros', "
        "'magnitude' or 'none'."
    )
