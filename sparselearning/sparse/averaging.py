"""Gradients of active values, averaged over processes where DistributedDataParallel averages those of other weights.

DistributedDataParallel (DDP) makes its buckets once, for parameters whose gradients have their shape. A held weight has
the shape of the dense one and a gradient of (nonzeros,), which changes when masks move. DDP leaves it out
(`leave_out`), and what DDP would do for it is done here, in the same passes: those whose forward pass went through DDP,
outside `no_sync`.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from sparselearning.processes.group import Group
from sparselearning.sparse.held_weight import HeldWeight

BUCKET_BYTES = 1 << 20  # layers are sent together until they have so many


@dataclass
class Traffic:
    """Bytes that this process handed over to be sent.

    An all-reduce of n numbers counts as n, a gathering of n from each process as n for each of the others, a broadcast
    on the process that it comes from.
    """

    gradients: int = 0  # averages of gradients of active values
    updates: int = 0  # gradients for growth, and places
    passes: int = 0  # backward passes that ended with averages

    @property
    def per_pass(self) -> float:
        """Bytes for each backward pass that ended with averages; updates are spread over them."""
        return (self.gradients + self.updates) / max(self.passes, 1)


class Member:
    """A parameter whose gradient is averaged; `done` is called when its gradient is complete."""

    def __init__(self, averaging: Averaging, parameter: Tensor, done: Callable[[], None]):
        self.averaging, self.parameter, self.done = averaging, parameter, done
        self.begin()

    def begin(self) -> None:
        """Begin a backward pass."""
        self.ready = self.sent = self.present = False
        self.late: Tensor | None = None  # a gradient that came when another was on its way

    @property
    def gradient(self) -> Tensor:
        """The gradient; there is one."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def arrived(self) -> None:
        """Note that torch has accumulated the gradient of this backward pass."""
        self.averaging.arrived(self)

    def add(self, gradient: Tensor) -> None:
        """Add a gradient that comes beside the one that torch accumulates."""
        if self.averaging.expected:
            self.averaging.start()
        if self.averaging.waiting is not None and self.sent:
            self.late = gradient if self.late is None else self.late.add_(gradient)
            return
        grad = self.parameter.grad
        self.parameter.grad = gradient if grad is None else grad.add_(gradient)
        if not self.averaging.expected:
            self.done()


class Averaging:
    """Averages gradients over the processes of a group, while the backward pass goes on.

    Every process sends the same buckets in the same order in every pass, zeros for parameters that got no gradient, so
    that none waits for another in vain. A gradient that no process has stays None. At the end of the backward pass all
    gradients are complete, as with DDP.
    """

    def __init__(self, group: Group):
        self.group, self.traffic = group, Traffic()
        self.channel = group.channel("gradients")
        self.members: list[Member] = []
        self.known: Any = lambda: None  # the DDP that was checked last
        self.expected = False  # whether the next backward pass ends with averages
        self.waiting: deque[list[Member]] | None = None  # buckets that are not sent yet, in a backward pass
        self.works: list[tuple[Sequence[Member], Tensor, Any]] = []  # bucket, its numbers, and who sends them

    def __deepcopy__(self, memo: dict[int, Any]) -> Averaging:
        return Averaging(self.group)

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_another_time, ()  # connections are those of one process

    def member(self, parameter: Tensor, done: Callable[[], None]) -> Member:
        """Average the gradient of a parameter from now on; all processes take the same in the same order."""
        self.members.append(Member(self, parameter, done))
        return self.members[-1]

    def let_go(self, member: Member, weight: Tensor, roots: Sequence[nn.Module]) -> None:
        """Leave a weight that trains densely from now on to DDP; average its gradient if a DDP has left it out."""
        if self.known() is None:
            self.members.remove(member)
            take_in(weight, roots)
            return
        member.parameter, member.done = weight, _nothing
        weight.register_post_accumulate_grad_hook(lambda _: member.arrived())

    def watch(self, root: nn.Module) -> None:
        """Notice the forward passes of a module."""
        root.register_forward_hook(Watch(self))

    def passed(self, output: Any) -> None:
        """Note a forward pass: whether it is one of a DDP, whose backward pass is to end with averages."""
        around = DistributedDataParallel._get_active_ddp_module()
        if around is None or not torch.is_grad_enabled():
            return
        if self.known() is not around:
            check_left_out(around)
            self.known = weakref.ref(around)
        self.expected, self.waiting, self.works = around.require_backward_grad_sync, None, []
        for each in tree_leaves(output) if self.expected else ():
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(lambda _: self.start())

    def start(self) -> None:
        """Begin a backward pass, unless it has begun."""
        if not self.expected or self.waiting is not None:
            return
        for member in self.members:
            member.begin()
        trained = [member for member in reversed(self.members) if member.parameter.requires_grad]
        self.waiting = deque(buckets_of(trained))
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)  # pyright: ignore[reportAttributeAccessIssue]

    def arrived(self, member: Member) -> None:
        """Send what is complete, now that this parameter has its gradient; the last bucket waits for `finish`."""
        if not self.expected:
            member.done()
            return
        self.start()
        if member.ready:
            raise RuntimeError(
                "A layer with weights='sparse' got its gradient twice in one backward pass, as where parts of a "
                "network are computed again (checkpoint(use_reentrant=True)). Use use_reentrant=False."
            )
        member.ready = True
        assert self.waiting is not None
        while len(self.waiting) > 1 and all(each.ready for each in self.waiting[0]):
            self.send(self.waiting.popleft())

    @torch.no_grad()
    def send(self, bucket: Sequence[Member], last: bool = False) -> None:
        """Begin to average the gradients of a bucket; with the last go flags: who has a gradient, who a late one."""
        for member in bucket:
            member.sent, member.present = True, member.parameter.grad is not None
            if not member.present:
                member.parameter.grad = torch.zeros_like(member.parameter)
        parts = [member.gradient.flatten() for member in bucket]
        if last:
            sent = [member for member in self.members if member.sent]
            flags = [[member.present for member in sent], [member.late is not None for member in sent]]
            parts.append(torch.tensor(flags).to(parts[0]).flatten())
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        self.works.append((bucket, flat, self.reduce(flat.div_(self.group.size))))

    def reduce(self, values: Tensor) -> Any:
        """Begin to add up a tensor over the processes, in place."""
        self.traffic.gradients += values.numel() * values.element_size()
        return dist.all_reduce(values, group=self.channel, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """End a backward pass: wait until all gradients are averaged."""
        while self.waiting:
            self.send(self.waiting.popleft(), last=not self.waiting)
        rest = torch.zeros(0)
        for bucket, flat, work in self.works:
            work.wait()
            sizes = [member.parameter.numel() for member in bucket]
            *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
            for member, part in zip(bucket, parts, strict=True):
                if member.gradient.data_ptr() != part.data_ptr():
                    member.gradient.copy_(part.view_as(member.parameter))
        sent = [member for member in self.members if member.sent]
        for member, present, late in zip(sent, *rest.view(2, len(sent)).tolist(), strict=True):
            if late:
                self.add_late(member)
            elif not present:
                member.parameter.grad = None
        self.expected, self.waiting, self.works = False, None, []
        self.traffic.passes += 1
        for member in sent:
            if member.parameter.grad is not None:
                member.done()

    def add_late(self, member: Member) -> None:
        """Add the average of what came when the gradient was on its way, on any of the processes."""
        gradient = torch.zeros_like(member.parameter) if member.late is None else member.late
        self.reduce(gradient.div_(self.group.size)).wait()
        member.gradient.add_(gradient)


def _of_another_time() -> None:
    return None


def _nothing() -> None:
    pass


class Watch:
    """A forward hook that tells an Averaging; in a copy of the module it tells nobody."""

    def __init__(self, averaging: Averaging | None = None):
        self.averaging: Any = (lambda: None) if averaging is None else weakref.ref(averaging)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if (averaging := self.averaging()) is not None:
            averaging.passed(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()


def buckets_of(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Divide parameters into those that are sent together: of one dtype, until they have `BUCKET_BYTES`."""
    bucket, size = [], 0
    for member in members:
        if bucket and (size >= BUCKET_BYTES or member.parameter.dtype != bucket[0].parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(member)
        size += member.parameter.numel() * member.parameter.element_size()
    if bucket:
        yield bucket


def leave_out(module: nn.Module) -> None:
    """Let a DDP that is made around `module` leave out its held weights."""
    names = {name for name, weight in module.named_parameters(remove_duplicate=False) if isinstance(weight, HeldWeight)}
    names |= {f".{name}" for name in names if "." not in name}  # DDP writes so where it is around the layer itself
    known = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, known | names)


def take_in(weight: Tensor, roots: Sequence[nn.Module]) -> None:
    """Undo `leave_out` for one weight."""
    for root in roots:
        names = {name for name, each in root.named_parameters(remove_duplicate=False) if each is weight}
        names |= {f".{name}" for name in names}
        root._ddp_params_and_buffers_to_ignore = root._ddp_params_and_buffers_to_ignore - names  # pyright: ignore
    vars(weight).pop("_ddp_ignored", None)


def refuse_earlier(module: nn.Module) -> None:
    """Check that no DDP was made before the weights of `module` are held.

    Raises:
        ValueError: if one was; it holds on to the dense weights, and waits for their gradients.
    """
    if not dist.is_initialized():
        return
    gc.collect()  # a DDP is a part of cycles, and stays for a while when nobody uses it any more
    own = {id(parameter) for parameter in module.parameters()}
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    if any(id(parameter) in own for wrapper in wrappers for parameter in wrapper.module.parameters()):
        raise ValueError(
            "weights='sparse' replaces weights that DistributedDataParallel holds on to. Wrap the model afterwards: "
            "masking.add_module(model, ...), then DistributedDataParallel(model)."
        )


def check_left_out(around: DistributedDataParallel) -> None:
    """Check that a DDP leaves out all held weights inside it.

    Raises:
        ValueError: if it does not.
    """
    for name, weight in around.module.named_parameters(remove_duplicate=False):
        if isinstance(weight, HeldWeight) and name not in around.parameters_to_ignore:
            raise ValueError(
                f"DistributedDataParallel was made around {type(around.module).__name__}, and holds on to {name}, "
                "whose active values are trained in its place (weights='sparse'). Call add_module with the module "
                "that DistributedDataParallel is made around, before that."
            )
    if around._join_config.enable:
        raise ValueError("weights='sparse' needs equally many batches on all processes: leave out torch's Join.")
