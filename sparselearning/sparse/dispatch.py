"""How an operator is called: through torch, or its kernel alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from sparselearning.sparse.derivatives import transformed

# Of gradients that autograd computes at once (is_grads_batched), whose numbers no kernel sees.
is_one_of_many = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]

is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # from torch 2.7 on

KERNELS = {}  # by the operator's name; ops.py registers them
GRADIENTS = {}  # the operator's backward, and what it saves for it


class Recorded(torch.autograd.Function):
    """A kernel and its gradients, as autograd records them; the operator's name comes last."""

    @staticmethod
    def forward(ctx, *given):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, name = given
        y = KERNELS[name](*inputs)
        ctx.backward_of, save = GRADIENTS[name]
        save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *ctx.backward_of(ctx, dy), None


def run(name: str, x: Tensor, *arguments) -> Tensor:
    """Call an operator on x. Where nothing looks at the call, this is its kernel alone, or the kernel and autograd.

    torch's own way to an operator of Python takes longer than a small kernel.
    """
    if not is_plain(x):
        return getattr(torch.ops.sparselearning, name)(x, *arguments)
    if torch.is_grad_enabled():
        return Recorded.apply(x, *arguments, name)  # pyright: ignore[reportReturnType]
    return KERNELS[name](x, *arguments)


def unobserved(x: Tensor) -> bool:
    """Return whether x is a plain tensor and nothing records, transforms or traces what is done with it."""
    return not torch.is_grad_enabled() and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Return whether x is a plain tensor and nothing but autograd looks at what is done with it."""
    return (
        type(x) is Tensor
        and not (torch.compiler.is_compiling() or is_tracing() or transformed())
        and not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())
        and not is_one_of_many(x)
    )


def conv_for(images: Tensor) -> str:
    """Return the operator for images; where a program for any number of them is exported, the order must not vary."""
    return "conv2d_plain" if is_exporting() and isinstance(images.shape[0], torch.SymInt) else "conv2d"
