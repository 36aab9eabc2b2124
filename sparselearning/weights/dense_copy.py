"""Weights that keep their values while they are inactive: the optimizer steps them, the network does not see them.

Around a step of the optimizer, the masked weights are exchanged for a dense copy of them:

    W <- D;  G <- G * B + exploration         before the step
    step
    D <- W where B, else D;  W <- f(D) * A    after the step

Whoever writes W in between (load_state_dict, nn.init, an average of weights that is swapped in) means it: where W is
no longer what was shown, D takes it over; see `DenseCopy.notice`.

A are the masks, and B the larger set of weights that is trained. With weights="kept" (Top-KAST) f is the identity and
B the 2 |A_i| largest weights of layer i. With weights="soft" (ST-3) f shrinks weights towards zero by the magnitude
of the largest inactive one, and B is everything: gradients pass straight through.

Top-KAST: Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517, section 2. ST-3: Vanderschueren & De Vleeschouwer
2023, https://arxiv.org/abs/2212.01076, without its scaling of weights. docs/methods.md says where else we differ.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.budgets import layers_of
from sparselearning.functions import FunctionError
from sparselearning.layer import SparseLayer
from sparselearning.loading import check_tensor
from sparselearning.native.zero import zero_inactive
from sparselearning.patterns import without_pattern
from sparselearning.processes import distributed
from sparselearning.processes.sharded import is_sharded
from sparselearning.selection import add_highest
from sparselearning.weights.regrowth import gradient_scale, gradient_signs
from sparselearning.weights.zeros import Ahead, Layers, Zeros


class DenseCopy(Zeros):
    """A dense copy of the weights is trained beside the network.

    Args:
        backward: how many times as many weights are trained as are active; 0 for all.
        soft: shrink the active weights by the magnitude of the largest inactive one.
        settings: as `Zeros` takes them.

    Raises:
        ValueError: as `Zeros`, and for `regrown`: a weight that grows has the value that it kept.
    """

    exchanges = keeps_inactive = True

    def __init__(self, *, backward: float = 0.0, soft: bool = False, **settings: Any):
        super().__init__(**settings)
        self.backward, self.soft = backward, soft
        self.kind = "soft" if soft else "kept"
        self.shown: dict[str, Tensor] = {}  # layer name -> the mask that its weight was shown with
        self.exchanged = self.fresh = False  # weights are the dense copy now; they were shown just now
        if self.regrown != "zero":
            raise ValueError(
                f"With weights={self.kind!r} a weight that grows has the value that it kept; leave out "
                f"regrown={self.regrown!r}."
            )
        if self.own_steps:
            raise ValueError(
                f"With weights={self.kind!r} inactive weights train, too, and their time steps do not begin when they "
                "grow; leave out reset_state='restart', regrown_warm_up and lr_by_density, or use weights='zero'."
            )

    def check(self, module: nn.Module, layers: Layers) -> None:
        """Check that the weights are whole.

        Raises:
            ValueError: if they are sharded.
        """
        if any(is_sharded(layer.mask) for layer in layers):
            raise ValueError(f"weights={self.kind!r} needs whole weights; sharded ones take weights='zero'.")

    @torch.no_grad()
    def add(self, module: nn.Module, layers: Layers, ahead: Ahead) -> list[SparseLayer]:
        """Copy the weights; of several processes, those of the first."""
        for layer in layers:
            layer.memory["dense"] = distributed.send_to_all(layer.master.detach().clone())
        self.follow(layers)
        return list(layers)

    @torch.no_grad()
    def before_step(self, layers: Layers, closure: Callable[..., Any] | None) -> None:
        """Let the optimizer step the dense copy, or see what a closure is to see of it."""
        self.notice(layers)
        super().before_step(layers, closure)

    def give(self, layers: Layers) -> None:
        """Let the optimizer step the dense copy where it is trained.

        The exploration term of Jayakumar et al. 2020 (section 2.3) is taken from the optimizer's weight decay: that of
        weights that are trained but inactive is divided by the layer's density.
        """
        self.pull_weights(layers)
        self.exchanged = True
        groups = self.optimizer.param_groups
        decay = {id(weight): group.get("weight_decay", 0) for group in groups for weight in group["params"]}
        signs = gradient_signs(self.optimizer)
        for layer in layers:
            weight, dense, gradient = layer.master, layer.memory["dense"], layer.master.grad
            weight.copy_(dense)
            if not self.backward or gradient is None:
                continue
            trained = layer.memory["trained"]
            zero_inactive([gradient], [trained])
            factor = signs[id(weight)] * decay[id(weight)] * (1 / max(layer.density, 1e-12) - 1)
            if factor:
                gradient.add_(dense * (trained & ~layer.mask) * (factor * gradient_scale(self.optimizer)))

    @torch.no_grad()
    def after_step(self, layers: Layers) -> None:
        """Copy what was trained, and show the network its active weights."""
        super().after_step(layers)
        if not self.exchanged:
            return
        for layer in layers:
            dense = layer.memory["dense"]
            dense.copy_(torch.where(layer.memory["trained"], layer.master, dense) if self.backward else layer.master)
        self.show(layers)
        self.exchanged, self.fresh = False, True

    def moved(self, layers: Layers, before: Sequence[Tensor]) -> None:
        """Follow masks that have moved; `before` is what they were."""
        self.notice(layers)
        super().moved(layers, before)
        self.follow(layers)

    @torch.no_grad()
    def follow(self, layers: Layers) -> None:
        """Choose anew which weights are trained, and how far they are shrunk."""
        for layer in layers:
            dense = layer.memory["dense"]
            if self.backward:
                inactive = round((self.backward - 1) * layer.nonzeros)
                layer.memory["trained"] = add_highest(dense.abs(), without_pattern(layer.mask), inactive)
            if self.soft:
                layer.memory["threshold"] = dense.masked_fill(layer.mask, 0).abs().max()
        for budget in {layer.budget: None for layer in layers if self.soft}:  # one for the network
            thresholds = [layer.memory["threshold"] for layer in layers_of(budget, layers)]
            highest = torch.stack([threshold.to(thresholds[0].device) for threshold in thresholds]).max()
            for threshold in thresholds:
                threshold.copy_(highest)
        self.remember(layers)
        self.show(layers)

    def check_state(self, state: dict[str, Any], layers: Layers, saved: dict[str, Any]) -> None:
        """Check that the saved memory of every layer holds its dense copy.

        Raises:
            RuntimeError: if it does not.
        """
        for layer in layers:
            memory, entry = saved[layer.name].get("memory", {}), f"layers[{layer.name!r}]['memory']"
            check_tensor(f"{entry}['dense']", memory.get("dense"), layer.shape, "floating")
            if self.backward:
                check_tensor(f"{entry}['trained']", memory.get("trained"), layer.shape, torch.bool)
            if self.soft:
                check_tensor(f"{entry}['threshold']", memory.get("threshold"), (), "floating")

    def load_state_dict(self, state: dict[str, Any], layers: Layers) -> None:
        """Show the network the copy that was loaded."""
        self.remember(layers)
        self.show(layers)

    def remember(self, layers: Layers) -> None:
        """Remember the masks with which weights are shown from now on."""
        for layer in layers:
            self.shown[layer.name] = layer.mask.detach().clone()

    @torch.no_grad()
    def show(self, layers: Layers) -> None:
        """Set the weights to what the network sees of the dense copy."""
        for layer in layers:
            layer.set_weight(self.seen(layer))
        super().apply(layers)

    def seen(self, layer: SparseLayer) -> Tensor:
        """Return what the network sees of the dense copy where it is active."""
        dense = layer.memory["dense"]
        if self.soft:
            return (dense.abs() - layer.memory["threshold"]).clamp_(min=0).copysign_(dense)
        return dense

    @torch.no_grad()
    def notice(self, layers: Layers) -> None:
        """Let the dense copy take over what somebody else has written into the weights since they were shown.

        Values are compared, entry by entry and without waiting for a device: a weight that is written through `.data`
        has the same version, and one that was swapped and swapped back is as it was. Soft weights are enlarged by what
        they are shrunk by.
        """
        for layer in layers:
            if self.exchanged or layer.name not in self.shown:
                continue
            weight, dense, mask = layer.master, layer.memory["dense"], self.shown[layer.name].to(layer.master.device)
            untouched = weight == torch.where(mask, self.seen(layer).to(weight.dtype), 0)
            values = weight.addcmul(weight.sign(), layer.memory["threshold"]) if self.soft else weight
            dense.copy_(torch.where(untouched, dense, values))

    @torch.no_grad()
    def apply(self, layers: Layers) -> None:
        """Set inactive weights to zero, in place; what was written into them is kept."""
        fresh, self.fresh = self.fresh, False
        if not fresh:
            self.notice(layers)
        super().apply(layers)
        for layer in layers:
            if not fresh and layer.name in self.shown:
                self.shown[layer.name] = self.shown[layer.name].to(layer.mask.device) & layer.mask

    def copies_of(self, layer: SparseLayer) -> Iterable[tuple[str, Tensor]]:
        """Check that the optimizer keeps no copy of the weights, which would be dense.

        Raises:
            RuntimeError: if it does.
        """
        for name, _ in self.copies.of(layer.master, layer.mask, layer.memory["dense"]):
            raise RuntimeError(
                f"{type(self.copies.chain[0]).__name__} keeps a copy of the weights of its own, {name!r}, which is "
                f"dense with weights={self.kind!r}. Use weights='zero', or an optimizer without a copy."
            )
        return ()

    def release(self, layers: Layers) -> None:
        """Let go of weights that stay dense from now on."""
        for layer in layers:
            self.shown.pop(layer.name, None)

    def describe(self, layer: SparseLayer) -> str:
        """Return how the layer's weight is held, in a few words."""
        return "dense copy"

    def trained_mask(self, layer: SparseLayer) -> Tensor | None:
        """Return which entries of the dense copy the optimizer trains; None for all."""
        return layer.memory["trained"] if self.backward else None

    def trained_density(self, layer: SparseLayer) -> float:
        """Return the fraction of the layer's weights that the optimizer trains."""
        return min(self.backward * layer.density, 1.0) if self.backward else 1.0


def dense_weight(masking, name: str) -> Tensor:
    """Return a weight with the values of its inactive entries.

    Raises:
        FunctionError: if they are not kept.
    """
    layer = next(layer for layer in masking.layers if layer.name == name)
    if "dense" not in layer.memory or not isinstance(masking.held, DenseCopy):
        raise FunctionError(f"The values of inactive weights of {name} are not kept: Masking(..., weights='kept').")
    masking.held.notice([layer])
    return layer.memory["dense"]
