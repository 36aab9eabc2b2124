"""Weights that keep their values while they are inactive: the network does not see them, the optimizer steps them.

Around a step of the optimizer, the masked weights are exchanged for a dense copy of them:

    W <- D;  G <- G * B + exploration         before the step
    step
    D <- W where B, else D;  W <- f(D) * A    after the step

A are the masks, and B the larger set of weights that is trained. With inactive="kept" (Top-KAST) f is the identity and
B the 2 |A_i| largest weights of layer i. With inactive="soft" (ST-3) f shrinks weights towards zero by the magnitude
of the largest inactive one, and B is everything: gradients pass straight through.

Top-KAST: Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517, section 2. ST-3: Vanderschueren & De Vleeschouwer
2023, https://arxiv.org/abs/2212.01076, without its scaling of weights. docs/methods.md says where else we differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparselearning.functions import FunctionError
from sparselearning.layers import SparseLayer
from sparselearning.native.zero import zero_inactive
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded
from sparselearning.selection import add_highest
from sparselearning.weights.regrowth import gradient_scale


@dataclass(frozen=True)
class DenseCopy:
    """How a dense copy of the weights is trained beside the network.

    backward: how many times as many weights are trained as are active, 0 for all.
    soft: shrink the active weights by the magnitude of the largest inactive one.
    """

    backward: float = 0.0
    soft: bool = False

    @torch.no_grad()
    def add(self, masking, layers: Sequence[SparseLayer]) -> None:
        """Begin with the weights that there are; of several processes, those of the first."""
        for layer in layers:
            if is_sharded(layer.mask):
                raise ValueError(f"inactive={masking.inactive!r} needs whole weights; sharded ones take 'zero'.")
            layer.memory["dense"] = distributed.send_to_all(layer.master.detach().clone())
        self.follow(layers)

    @torch.no_grad()
    def before_step(self, masking, closure: Callable | None = None) -> None:
        """Let the optimizer step the dense copy where it is trained.

        The exploration term of Jayakumar et al. 2020 (section 2.3) is taken from the optimizer's weight decay: that of
        weights that are trained but inactive is divided by the layer's density.

        Raises:
            RuntimeError: if the step computes the loss itself, which would see the dense weights.
        """
        if closure is not None:
            raise RuntimeError(
                f"inactive={masking.inactive!r} exchanges weights around a step, and a closure would see the dense "
                "ones. Call backward() first, and step() without closure."
            )
        decay = {id(weight): group.get("weight_decay", 0) for group in masking.optimizer.param_groups
                 for weight in group["params"]}  # fmt: skip
        for layer in masking.layers:
            weight, dense, gradient = layer.master, layer.memory["dense"], layer.master.grad
            weight.copy_(dense)
            if not self.backward or gradient is None:
                continue
            trained = layer.memory["trained"]
            zero_inactive([gradient], [trained])
            factor = decay[id(weight)] * (1 / max(layer.density, 1e-12) - 1)
            if factor:
                gradient.add_(dense * (trained & ~layer.mask) * (factor * gradient_scale(masking.optimizer)))

    @torch.no_grad()
    def after_step(self, masking) -> None:
        """Take over what was trained, and show the network its active weights."""
        for layer in masking.layers:
            dense = layer.memory["dense"]
            dense.copy_(torch.where(layer.memory["trained"], layer.master, dense) if self.backward else layer.master)
        self.show(masking.layers)

    @torch.no_grad()
    def follow(self, layers: Sequence[SparseLayer]) -> None:
        """Follow masks that have moved."""
        for layer in layers:
            dense = layer.memory["dense"]
            if self.backward:
                inactive = round((self.backward - 1) * layer.nonzeros)
                layer.memory["trained"] = add_highest(dense.abs(), layer.mask.detach(), inactive)  # of any pattern
            if self.soft:
                layer.memory["threshold"] = dense.masked_fill(layer.mask, 0).abs().max()
        if self.soft and layers:  # one for the network
            threshold = torch.stack([layer.memory["threshold"].to(layers[0].mask.device) for layer in layers]).max()
            for layer in layers:
                layer.memory["threshold"].copy_(threshold)
        self.show(layers)

    @torch.no_grad()
    def show(self, layers: Sequence[SparseLayer]) -> None:
        """Set the weights to what the network sees of the dense copy."""
        for layer in layers:
            dense = layer.memory["dense"]
            if self.soft:
                dense = dense.sign() * (dense.abs() - layer.memory["threshold"]).clamp(min=0)
            layer.master.copy_(dense)
            zero_inactive([layer.master], [layer.mask])
            if layer.weight is not layer.master:
                layer.weight.copy_(layer.master)


INACTIVE: Mapping[str, DenseCopy | None] = {"zero": None, "kept": DenseCopy(backward=2.0), "soft": DenseCopy(soft=True)}


def dense_weight(masking, name: str) -> Tensor:
    """Return a weight with the values of its inactive entries.

    Raises:
        FunctionError: if they are not kept.
    """
    dense = masking.memory[name].get("dense")
    if dense is None:
        raise FunctionError("A 'dense_magnitude' mode compares inactive weights, too: Masking(..., inactive='kept').")
    return dense
