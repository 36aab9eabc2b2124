"""Which processes train one network together, and how they meet before they exchange anything.

`within(group)` says it for the code inside; without it all processes train one network.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from sparselearning.processes.mail import Late, exchange

PATIENCE = timedelta(minutes=5)  # the longest that a process waits for one that is alive but silent
LEAST_PATIENCE = timedelta(seconds=30)  # after a short time since the last meeting


class ProcessError(RuntimeError):
    """The processes no longer train one model: their masks differ, or a process is gone or somewhere else."""


class Group:
    """Processes that train one network.

    Args:
        ranks: theirs, among all processes.
        along: process groups that reach all of them, one after the other: one, or one for each dimension of a mesh.
        assumed: nobody said that these train one network.
    """

    def __init__(self, ranks: Sequence[int], along: Sequence[Any], assumed: bool):
        self.ranks, self.along, self.assumed = sorted(ranks), list(along), assumed
        self.met: float | None = None  # when they met last

    def __deepcopy__(self, memo: dict) -> "Group":
        return self

    def __reduce__(self) -> tuple:
        return _of_all, ()  # connections are those of one process

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """Place of this process, from 0."""
        return self.ranks.index(dist.get_rank()) if self.size > 1 else 0

    def broadcast(self, values: Tensor) -> None:
        """Overwrite a tensor with that of the first process, in place."""
        for group in self.along if self.size > 1 else ():
            dist.broadcast(values, src=dist.get_process_group_ranks(group)[0], group=group)

    def reduce(self, values: Tensor, operation: str = "SUM") -> None:
        """Replace a tensor by its sum over the processes, or "MAX", in place."""
        for group in self.along if self.size > 1 else ():
            dist.all_reduce(values, getattr(dist.ReduceOp, operation), group=group)

    def channel(self, use: str, backend: str | None = None) -> Any:
        """Return a process group of these processes for one use alone, so that its messages wait for no others.

        All of them call this at the same time when it is new. `backend` None: that of CPU tensors.
        """
        if dist.group.WORLD not in _channels:
            _channels.clear()
        channels, key = _channels.setdefault(dist.group.WORLD, {}), (use, *self.ranks)
        if key not in channels:
            backend = backend or ("mpi" if dist.get_backend() == "mpi" else "gloo")
            alone = backend != "mpi"
            channels[key] = dist.new_group(self.ranks, PATIENCE, backend, use_local_synchronization=alone)
        return channels[key]

    def meet(self, place: str, problem: Exception | None = None, **facts: Any) -> list[dict[str, Any]]:
        """Wait until every process is at this place; return the facts that each brings, by place in the group.

        Facts are small. They go through a Gloo group of their own, so that a process which waits elsewhere, as in a
        backward pass, disturbs nothing.

        Raises:
            ProcessError: if a process does not come in time, is at another place, or has a problem; not on those that
                have one.
        """
        facts |= {"place": place, "problem": problem and f"{type(problem).__name__}: {problem}"}
        if self.size == 1 or dist.get_backend() == "fake":
            return [facts]
        began = time.monotonic()
        try:
            all_facts = exchange(facts, self.ranks, self.channel("meetings", "gloo"), self._patience())
        except Late as error:
            raise ProcessError(self._missed(place, error.rank, time.monotonic() - began)) from error
        self.met = time.monotonic()
        if problem is None:
            self._compare_places(all_facts)
        return all_facts

    def _patience(self):
        """Return how many seconds to wait: as long as this process has worked since the last meeting, in bounds."""
        worked = PATIENCE.total_seconds() if self.met is None else time.monotonic() - self.met
        return min(max(worked, LEAST_PATIENCE.total_seconds()), PATIENCE.total_seconds())

    def _missed(self, place, rank, seconds):
        me = dist.get_rank()
        which = f"process {rank}" if me == self.ranks[0] else f"the others (process {rank} says for which)"
        return (
            f"Process {me} waited {seconds:.0f} s at {place} for {which}, which did not come or is gone. Processes "
            f"{', '.join(map(str, self.ranks))} must make the same calls and the same number of steps. Where they "
            "train several networks, say which belong together: add_module(model, process_group=...)."
        )

    def _compare_places(self, all_facts):
        for rank, facts in zip(self.ranks, all_facts, strict=True):
            if facts["problem"]:
                raise ProcessError(f"Process {rank} failed at {facts['place']}, and all stop: {facts['problem']}")
        places = [facts["place"] for facts in all_facts]
        if other := [i for i, place in enumerate(places) if place != places[0]]:
            raise ProcessError(
                f"Process {self.ranks[0]} is at {places[0]}, process {self.ranks[other[0]]} at {places[other[0]]}. All "
                "processes that share masks must make the same calls in the same order, and equally many steps."
            )


ALONE = Group([0], [], False)
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

_current: ContextVar[Group | None] = ContextVar("group", default=None)
_channels: dict[Any, dict[tuple[Any, ...], Any]] = {}  # {the group of all: {(use, *ranks): group}}


def _of_all() -> Group | None:
    return None


def current() -> Group:
    """Return the processes that train one network: those of `within`, or all."""
    if (group := _current.get()) is not None:
        return group
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return Group(range(dist.get_world_size()), [dist.group.WORLD], True)


@contextmanager
def within(group: Group | None) -> Iterator[None]:
    """Let this group train one network, as far as the code inside is concerned; None means all processes."""
    token = _current.set(group)
    try:
        yield
    finally:
        _current.reset(token)


def together(method: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Let the processes of `masking.group` run a method of a Masking together: if it fails on one, it fails on all."""

    @functools.wraps(method)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        masking: Any = args[0]
        with within(masking.group), failing_together(method.__name__):
            return method(*args, **kwargs)

    return call


@contextmanager
def failing_together(place: str, they_meet: bool = True) -> Iterator[None]:
    """If the code inside fails on this process, let the others fail, too, when they meet next."""
    try:
        yield
    except Exception as error:
        told, known = False, error
        while known is not None and not told:  # of a ProcessError the others know, or cannot be told
            told, known = isinstance(known, ProcessError) or getattr(known, "told", False), known.__cause__
        if they_meet and not told:
            error.told = True  # pyright: ignore[reportAttributeAccessIssue]
            with suppress(ProcessError):  # nobody came
                current().meet(place, error)
        raise


def choose_group(masking: Any, module: nn.Module, given: Any) -> None:
    """Set `masking.group` to the processes that share the masks of a module, also for the code that follows.

    That is the group or mesh that is given, the group of a DistributedDataParallel in the module, or all processes.

    Raises:
        ValueError: if this process is not in the group, or earlier modules of the Masking have another one.
    """
    group = _group_of(module, given)
    if masking.group is not None and group is not None and masking.group.ranks != group.ranks:
        raise ValueError(
            f"One Masking is for one group of processes. Its modules before are those of processes "
            f"{masking.group.ranks}, and {type(module).__name__} is of {group.ranks}. Make a Masking for each."
        )
    masking.group = masking.group or group
    _current.set(masking.group)


def _group_of(module, given):
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if given is None:
        replicated = (each for each in module.modules() if isinstance(each, nn.parallel.DistributedDataParallel))
        given = next((each.process_group for each in replicated), None)
    if given is None:
        return current()
    if isinstance(given, dist.ProcessGroup):
        ranks = dist.get_process_group_ranks(given)
    else:  # a DeviceMesh, or what new_group returns to the processes that are not in the group
        ranks = given.mesh.flatten().tolist() if hasattr(given, "mesh") else []
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"Expected a process group or a DeviceMesh that process {dist.get_rank()} is in, got {given}. Each process "
            "passes the group of those that train the same network."
        )
    return Group(ranks, [given] if isinstance(given, dist.ProcessGroup) else given.get_all_groups(), False)
