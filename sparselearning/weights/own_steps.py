"""Adam with a time step of its own for each weight, for weights that grow late in training.

Xiao et al. 2026, Memory-Efficient LLM Training with Dynamic Sparsity: From Stability to Practical Scaling, ICML 2026,
https://arxiv.org/abs/2606.00888 (SMET). Adam corrects the bias of its moments m and v by the number t of its steps. The
moments of a weight that grows begin at zero, so that its number t_i has to begin then, too; with t = 100,000 in its
place the first step is 3.16 times too large. For a layer of density d, W steps of warm-up and the learning rate a:

    a_i = a / sqrt(d) * min(t_i / W, 1)
    w <- w - a_i * (m / (1 - b1^t_i)) / (sqrt(v / (1 - b2^t_i)) + eps)

AdamW multiplies the weight by 1 - a_i * decay before. The optimizer is torch's: its step is taken back where it was
another one, and this one is made from the m and v that it has left, which do not depend on t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparselearning.layer import SparseLayer
from sparselearning.processes.sharded import local_part
from sparselearning.weights.optimizer import state_of
from sparselearning.weights.start_states import group_of

GROWN_AT = "grown_at"  # in a layer's memory: int32, the optimizer's step after which a weight grew; 0: at the start
NEGLIGIBLE = 2.0**-26  # what a bias may be apart from one, without any effect on a step in float32


class OwnSteps:
    """The time steps of single weights.

    Args:
        restart: whether the time step of a weight begins when the weight grows.
        warm_up: over how many steps the learning rate of a weight that has grown rises to its value; 0: at once.
        by_density: whether the learning rate of a layer is divided by the square root of its density.

    Raises:
        ValueError: for a warm-up that is no number of steps.
    """

    def __init__(self, restart: bool, warm_up: int, by_density: bool):
        if not isinstance(warm_up, int) or warm_up < 0:
            raise ValueError(f"Expected regrown_warm_up to be a number of steps, 0 or more, got {warm_up!r}.")
        self.restart, self.warm_up, self.by_density = restart, warm_up, by_density
        self.before: dict[str, Tensor] = {}  # layer name -> what the optimizer is stepping
        self.young: dict[str, tuple[Tensor, ...]] = {}  # layer name -> places of weights whose steps are their own
        self.decouples = False  # whether weight decay acts on weights, as AdamW's, and not on gradients

    def __bool__(self) -> bool:
        return self.restart or self.warm_up > 0 or self.by_density

    def fit(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the optimizer is torch's Adam or AdamW, and note which.

        Raises:
            ValueError: if it is not, and steps of their own are asked for.
        """
        if self and type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            raise ValueError(
                "reset_state='restart', regrown_warm_up and lr_by_density, which make SMET, are for steps of torch's "
                f"Adam and AdamW, got {type(optimizer).__name__}. Use one of these (--optimizer adam), or another "
                "method."
            )
        self.decouples = isinstance(optimizer, torch.optim.AdamW)

    # When weights grow

    def begin(self, layers: Sequence[SparseLayer]) -> None:
        """Note that no weight has grown yet."""
        for layer in layers if self.restart or self.warm_up else ():
            like = layer.entries.value.detach() if layer.compact else layer.mask  # pyright: ignore
            layer.memory[GROWN_AT] = torch.zeros_like(like, dtype=torch.int32)

    def note(self, layer: SparseLayer, regrown: Tensor, step: int) -> None:
        """Note that weights have grown after this step of the optimizer."""
        self.young.pop(layer.name, None)
        if (times := self.times(layer)) is not None:
            local_part(times).masked_fill_(local_part(regrown), step)

    def follow(self, layer: SparseLayer, origin: Tensor, step: int) -> None:
        """Follow the entries of a layer that holds no others, after this step.

        `origin` says where each was among the earlier ones, -1 for those that have grown: int32, (nonzeros,).
        """
        self.young.pop(layer.name, None)
        if (times := layer.memory.get(GROWN_AT)) is not None:
            if times.dim() == 1:
                times = F.pad(times, (0, 1)).index_select(0, origin.clamp(min=0))
            layer.memory[GROWN_AT] = times
            layer.memory[GROWN_AT] = self.times(layer).masked_fill_(origin < 0, step)  # pyright: ignore

    def times(self, layer: SparseLayer) -> Tensor | None:
        """Return after which step each weight grew, of the shape of what the optimizer steps; None if nobody asks."""
        times = layer.memory.get(GROWN_AT)
        if times is not None and layer.compact and times.dim() > 1:  # of a state of masked training
            times = layer.memory[GROWN_AT] = times.flatten()[layer.entries.position]  # pyright: ignore
        return times

    # A step

    def remember(self, layers: Sequence[SparseLayer], stepped_for: Callable[[SparseLayer], Tensor]) -> None:
        """Remember what the optimizer is going to step."""
        self.before = {layer.name: local_part(stepped_for(layer)).detach().clone() for layer in layers}

    @torch.no_grad()
    def correct(
        self,
        layers: Sequence[SparseLayer],
        optimizer: torch.optim.Optimizer,
        stepped_for: Callable[[SparseLayer], Tensor],
    ) -> None:
        """Make the step of each weight from that of the optimizer, which has just made one."""
        before, self.before = self.before, {}
        found = [(layer, stepped_for(layer)) for layer in layers if layer.name in before]
        found = [(layer, weight) for layer, weight in found if weight.grad is not None]  # Adam steps no others
        if self.by_density:
            weights = [local_part(weight) for _, weight in found]
            lengthen(weights, [before[layer.name] for layer, _ in found], [of_density(layer) for layer, _ in found])
        for layer, weight in found if self.restart or self.warm_up else ():
            if layer.name not in self.young:
                self.young[layer.name] = self.find_young(layer, optimizer, weight)
            if len((places := self.young[layer.name])[0]):
                old, scale = before[layer.name][places], of_density(layer) if self.by_density else 1.0
                state, group = state_of(optimizer, weight), group_of(optimizer, weight)
                steps = state["step"] - local_part(layer.memory[GROWN_AT])[places]
                local_part(weight)[places] = self.stepped(old, places, steps, scale, state, group)

    def stepped(
        self,
        old: Tensor,
        places: tuple[Tensor, ...],
        steps: Tensor,
        scale: float,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
    ) -> Tensor:
        """Return the weights at some places after the step that is their `steps`-th one; `old` is what they were."""
        precision = torch.promote_types(old.dtype, torch.float32)
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        m, v = (local_part(moment)[places].to(precision) for moment in (state["exp_avg"], second))
        rate = group["lr"] * scale
        if self.warm_up:
            rate = rate * (steps / self.warm_up).clamp(max=1)
        time = steps if self.restart else state["step"]
        m, v = (moment / without_bias(time, beta) for moment, beta in zip((m, v), group["betas"], strict=True))
        decay = group["weight_decay"] if self.decouples or group.get("decoupled_weight_decay") else 0.0
        return ((1 - rate * decay) * old.to(precision) - rate * m / (v.sqrt() + group["eps"])).to(old.dtype)

    def find_young(self, layer: SparseLayer, optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[Tensor, ...]:
        """Return where weights have grown of which the number of steps still matters: until the next update."""
        if (times := self.times(layer)) is None:
            return (torch.empty(0),)
        betas = group_of(optimizer, weight)["betas"] if self.restart else ()
        horizon = max(self.warm_up, *map(steps_of_bias, betas), 0)
        here = local_part(times)
        young = (here > 0) & (here >= int(state_of(optimizer, weight)["step"]) - horizon)
        if not layer.compact:
            young &= local_part(layer.mask)
        return young.nonzero(as_tuple=True)


def lengthen(weights: list[Tensor], before: list[Tensor], factors: list[float]) -> None:
    """Make the step from `before` to each weight so many times as long, in place."""
    for weight, old, factor in zip(weights, before, factors, strict=True):
        weight.lerp_(old, 1 - factor)


def of_density(layer: SparseLayer) -> float:
    """Return 1 / sqrt(density) of a layer."""
    return math.sqrt(layer.size / max(layer.nonzeros, 1))


def without_bias(steps: Tensor, beta: Any) -> Tensor:
    """Return 1 - beta^steps, precisely for one step, too.

    >>> without_bias(torch.tensor([1, 2]), 0.5)
    tensor([0.5000, 0.7500])
    """
    beta = float(beta)
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps, dtype=torch.float32)


def steps_of_bias(beta: Any) -> int:
    """Return after how many steps 1 - beta^steps is as good as one.

    >>> steps_of_bias(0.5), steps_of_bias(0.999)
    (26, 18013)
    """
    beta = float(beta)
    return math.ceil(math.log(NEGLIGIBLE) / math.log(beta)) if beta else 0
