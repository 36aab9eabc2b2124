"""A weight whose active values alone are held and trained, and the modules that multiply with it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.sparse import ops
from sparselearning.sparse.averaging import Member
from sparselearning.sparse.entries import Entries
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.observed import Observed, Pass
from sparselearning.sparse.on_demand import OnDemand, on_demand

Place = tuple[Any, str]  # a module, and the name of a parameter that it holds
Turned = tuple[Tensor, Tensor, Tensor]


def alive(here: weakref.ref[Any]) -> Held:
    """Return the weight that a hook belongs to."""
    held = here()
    assert held is not None, "the optimizer still steps the weights of a model that is gone"
    return held


class Held:
    """What the optimizer steps in place of a weight: its active values, (nonzeros,).

    The modules at `places` keep a parameter of the weight's shape, which holds no numbers of its own (held_weight.py).
    A tied weight has several places; their modules multiply with it in the same way.

    Args:
        places: modules, which are `Trained`, and their name of the weight.
        position: of the active entries in the flattened weight, ascending.
        value: of these entries, if the weight has none (on the meta device).
    """

    output = math.inf  # bytes that a module has put out in the last pass, if that is known
    loaded: Tensor | None = None  # where the entries of a loaded optimizer state are, int64
    hooks: tuple[Any, ...] = ()
    member: Member | None = None  # of those whose gradients are averaged over processes
    dense: HeldWeight  # the weight, whatever stands in its place in a module for the moment

    def __init__(self, places: Sequence[Place], position: Tensor, observed: Observed, value: Tensor | None = None):
        module, name = places[0]
        weight: nn.Parameter = module._parameters[name]
        value = weight.detach().flatten()[position] if value is None else value
        self.places, self.observed, self.shape = list(places), observed, weight.shape
        self.channels_last = is_channels_last(weight)  # whether it was so in memory, and will be at the end
        self.entries = Entries(self.shape, value.requires_grad_(weight.requires_grad), position, self.turn)
        self.attach()

    @property
    def module(self) -> Any:
        """The first of the modules, a `Trained`, which says how they multiply."""
        return self.places[0][0]

    @property
    def value(self) -> nn.Parameter:
        """The active values, row by row; no parameter of a module, for the weight stands for it."""
        return self.entries.value

    def attach(self) -> None:
        """Let the values stand in place of the weight's numbers; also in a copy."""
        module, name = self.places[0]
        weight = module._parameters[name]
        assert weight is not None
        weight.grad = None
        torch.utils.swap_tensors(weight, HeldWeight(self.entries, self.value.requires_grad))
        self.dense = weight
        for module, name in self.places:
            vars(module)["holds"] = {**module.holds, name: self}
        self.connect()

    def connect(self) -> None:
        """Let gradients of weight and values be noticed."""
        for hook in self.hooks:
            hook.remove()
        # Those of the weight that was exchanged (`swap_tensors`); torch would not call new ones beside them.
        self.dense._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]
        notice = super(HeldWeight, self.dense).register_post_accumulate_grad_hook
        here = weakref.ref(self)  # torch's tensors keep their hooks where no garbage collection sees a cycle
        self.hooks = (
            notice(lambda weight: alive(here).receive(weight)),
            self.value.register_post_accumulate_grad_hook(lambda _: alive(here).arrived()),
        )

    def end(self) -> None:
        """Give the modules the dense weight again, zeros included."""
        for hook in self.hooks:
            hook.remove()
        dense = self.entries.dense().contiguous(memory_format=self.memory_format())
        torch.utils.swap_tensors(self.dense, nn.Parameter(dense, self.dense.requires_grad))
        for module, name in self.places:
            vars(module)["holds"] = {other: held for other, held in module.holds.items() if other != name}
            if not module.holds:
                module.end()

    def memory_format(self) -> torch.memory_format:
        """Return that of the dense weight."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __getstate__(self) -> dict[str, Any]:
        return {name: entry for name, entry in vars(self).items() if name not in ("dense", "hooks", "member")}

    @torch.no_grad()
    def receive(self, weight: HeldWeight) -> None:
        """Give the values the gradient that arrived for the dense weight."""
        gradient = weight.arrived()
        if self.observed.observing:
            self.observed.collect(Pass(dense=gradient), self.value.grad)
        active = gradient.flatten()[self.entries.position]
        if self.member is not None:
            self.member.add(active)
            return
        self.value.grad = active if self.value.grad is None else self.value.grad.add_(active)
        self.complete()

    def arrived(self) -> None:
        """Note that torch has accumulated the values' gradient."""
        if self.member is None:
            self.complete()
        else:
            self.member.arrived()

    def complete(self) -> None:
        """Note that the values' gradient is complete."""
        self.observed.commit(self.value.grad)

    def watch(self, x: Tensor, y: Tensor, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
        """Let the backward pass of y hand over what the dense gradient follows from, if this step is observed.

        `whole` makes the gradient of all of the weight's outputs from that of y.
        """
        if not torch.compiler.is_compiling():
            self.output = y.nbytes
        if self.observed.observing and y.requires_grad:
            # What a layer has computed nobody writes any more; an input may be a buffer for the next batch, too.
            x = x.detach() if x.requires_grad else x.clone()
            y.register_hook(lambda dy: self.observed.collect(Pass(x, whole(dy.detach())), self.value.grad))
        return y

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change dtype, device or memory format, as nn.Module's `_apply` does."""
        self.entries.apply(function)
        with torch.no_grad():
            if self.dense.dim() == 4:
                small = self.value.new_zeros(2, 2, 2, 2).contiguous(memory_format=self.memory_format())
                self.channels_last = is_channels_last(function(small))
        if (self.dense.dtype, self.dense.device) != (self.value.dtype, self.value.device):
            self.attach()

    def on_demand(self, known: Iterable[Any] = ()) -> Tensor:
        """Return the dense weight; what is written into it goes to the values.

        Of a tied weight it is the tensor among `known` that is so already: writes into either reach both, as in torch.
        """
        write = self.entries.write
        for each in known if len(self.places) > 1 else ():
            if isinstance(each, OnDemand) and each.write == write:
                return each
        return on_demand(self.entries.dense(), write)

    # How the modules multiply

    def indices(self) -> tuple[Tensor, ...]:
        """Return the places of the values, as the kernels take them."""
        return self.entries.start, self.entries.column, *self.entries.turned

    def turn(self, start: Tensor, column: Tensor) -> Turned:
        """Return the nonzeros in the order of the input gradient."""
        return ops.transposed(start, column, self.module.as_convolution(self.shape))

    def norms(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers whose product bounds the gradient: one for each column of the matrix, and for each row."""
        return self.module.norms(x, dy)

    def gradient_of_rows(self, x: Tensor, dy: Tensor, first: int, last: int) -> Tensor:
        """Return the gradient of some rows of the weight's matrix, (last - first, width)."""
        return self.module.gradient_of_rows(x, dy, first, last)

    def gradient_at(self, x: Tensor, dy: Tensor, start: Tensor, column: Tensor) -> Tensor:
        """Return the gradient of some entries of the weight, (entries,); rows and columns as `Entries` has them."""
        return self.module.gradient_at(x, dy, start, column)

    def belong(self, x: Tensor, dy: Tensor) -> bool:
        """Return whether these can be an input of the modules, and the gradient of its output."""
        return x.dtype == dy.dtype == self.value.dtype and self.module.belong(x, dy, self.shape)


def is_channels_last(weight: Tensor) -> bool:
    """Return whether a weight has the memory format of that name."""
    turned = weight.dim() == 4 and not weight.is_contiguous()
    return turned and weight.is_contiguous(memory_format=torch.channels_last)
