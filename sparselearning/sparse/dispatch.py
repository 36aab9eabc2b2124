"""How an operator is called: through torch, or its kernel alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from sparselearning.sparse.derivatives import transformed

KERNELS = {}  # by the operator's name; ops.py registers them


def run(name: str, x: Tensor, *arguments) -> Tensor:
    """Call an operator on x, or its kernel alone if nothing records or traces the call, which saves some 40 us."""
    return KERNELS[name](x, *arguments) if unobserved(x) else getattr(torch.ops.sparselearning, name)(x, *arguments)


def unobserved(x: Tensor) -> bool:
    """Return whether x is a plain tensor and nothing records, transforms or traces what is done with it."""
    return not torch.is_grad_enabled() and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Return whether x is a plain tensor and nothing but autograd looks at what is done with it."""
    return (
        type(x) is Tensor
        and not (torch.compiler.is_compiling() or is_tracing() or transformed())
        and not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())
    )
