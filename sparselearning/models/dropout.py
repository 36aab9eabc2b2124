"""Dropout that draws sixteen random bits for a number, where torch's draws a number for each."""

import torch
from torch import Tensor, nn

DRAWS = 1 << 16  # values of sixteen bits


class Dropout(nn.Dropout):
    """nn.Dropout, four times as fast on a CPU; a number is dropped with a probability of round(65536 p) / 65536."""

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * DRAWS)
        plain = input.is_cpu and input.dtype == torch.float32 and not self.inplace and not torch.compiler.is_compiling()
        if not (self.training and plain and 0 < dropped < DRAWS):
            return super().forward(input)
        kept = torch.empty_like(input, requires_grad=False)
        torch.ge(random_bits(kept), dropped - DRAWS // 2, out=kept)
        return input * kept.mul_(DRAWS / (DRAWS - dropped))


def random_bits(like: Tensor) -> Tensor:
    """Return int16 numbers, all equally likely, of the shape and in the memory order of a tensor without gaps."""
    drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.int16)[: like.numel()].as_strided(like.shape, like.stride())
