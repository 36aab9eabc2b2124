"""Set inactive weights to zero: all that masks add to a step of the optimizer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_inactive(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set every tensor to zero where its mask is False, in place, without allocating or waiting for a device.

    A mask is bool, of its tensor's shape, one byte per entry. Infinite and NaN entries become zero too: the
    bits are multiplied, as whole numbers, because inf * 0 is NaN.
    """
    if torch.compiler.is_compiling():
        for tensor, mask in zip(tensors, masks, strict=True):
            tensor.masked_fill_(~mask, 0)  # fused into the optimizer's loop over the weights
        return
    bits, keep = [], []
    for tensor, mask in zip(tensors, masks, strict=True):
        whole_number = WHOLE_NUMBERS.get(tensor.element_size())
        if whole_number is None or type(tensor) not in (Tensor, Parameter):  # complex128, DTensor
            tensor.masked_fill_(~mask, 0)
        elif tensor.device.type == "cpu" and tensor.stride() == mask.stride():
            # torch would first write the mask out in the tensor's dtype; numpy converts it a piece at a time.
            entries = tensor.view(whole_number).numpy()
            np.multiply(entries, mask.view(torch.int8).numpy(), out=entries)
            torch.autograd.graph.increment_version(tensor)
        else:
            bits.append(tensor.detach().view(whole_number))
            keep.append(mask.view(torch.int8))
    if bits:
        torch._foreach_mul_(bits, keep)  # pyright: ignore[reportPrivateImportUsage]
