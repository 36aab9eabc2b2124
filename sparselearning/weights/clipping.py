"""The norm of the gradients of weights that train."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_norm_(masking: Any, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
    """Scale the gradients down, in place, until their norm is at most `max_norm`; return the norm that they had.

    As `torch.nn.utils.clip_grad_norm_` on all parameters that the optimizer steps, except that gradients of inactive
    weights, which train nothing, do not count: at a density of 2% they can be most of the norm. They are scaled with
    the others, so that growth by the gradient compares what the step used. Under GradScaler call
    `scaler.unscale_(optimizer)` before.

    Raises:
        RuntimeError: with `error_if_nonfinite`, if the norm is NaN or infinite.
    """
    held = masking.held
    masks = {held.stepped_for(layer): held.trained_mask(layer) for layer in masking.layers}
    parameters = {parameter: None for group in masking.optimizer.param_groups for parameter in group["params"]}
    stepped = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [_where(masks.get(parameter), parameter.grad) for parameter in stepped]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
    torch.nn.utils.clip_grads_with_norm_(stepped, max_norm, norm)
    return norm


def _where(mask, gradient):
    return gradient if mask is None else torch.where(mask, gradient, 0)
