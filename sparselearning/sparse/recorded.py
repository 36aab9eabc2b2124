"""How a layer draws its weight: what its `reset_parameters` does to every entry, so that few can be drawn alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[Tensor], Any]

# In-place operations that give every entry a new value, each by itself
DRAWING = {
    f"aten::{name}_"
    for name in (
        *("uniform", "normal", "log_normal", "exponential", "cauchy", "geometric", "bernoulli", "random"),
        *("zero", "fill", "copy"),
    )
}
UNTAGGED = {"aten::abs_", "aten::threshold_"}  # pointwise, though torch does not tag them so


@dataclass(frozen=True)
class Recorded:
    """The operations that draw a weight, in order; each changes a tensor in place, every entry by itself."""

    steps: tuple[Step, ...]

    @torch.no_grad()
    def draw(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return `count` values on the CPU, distributed as the entries of the dense weight would be."""
        values = torch.empty(count, dtype=dtype, device="cpu")
        for step in self.steps:
            step(values)
        return values


def recorded(module: nn.Module, name: str, called: str | None = None) -> Recorded:
    """Return how `module.reset_parameters()` draws its parameter `name`, in memory that does not grow with the weight.

    It runs once, with all parameters and buffers of the module on the meta device; none of them changes. A function
    that leaves tensors on the meta device alone by itself, as told by their `device`, cannot be recorded.

    Args:
        name: of one of its parts' parameters ("q_proj.weight"), too, for a module that initialises its parts.
        called: the name of the weight in messages.

    Raises:
        ValueError: if there is no `reset_parameters`, it does not draw the weight, or it treats entries differently:
            orthogonal_, sparse_, dirac_, eye_, values from other tensors, or a part of the weight by itself.
    """
    called = called or f"{type(module).__name__}.{name}"
    reset = reset_of(module)
    if reset is None:
        raise ValueError(
            f"Expected {type(module).__name__} to say in reset_parameters() how {called} is drawn, and it has none. "
            "Define it, or name the weight in dense=[...]."
        )
    with _on_meta(module):
        weight = module.get_parameter(name)
        recorder = _Recorder(weight, called)
        try:
            with _truncated_normals(recorder), _NotMeta(weight), recorder:
                reset()
        except _Refused:
            raise
        except Exception as error:  # a user's function raises what it likes
            raise ValueError(
                f"reset_parameters() of {type(module).__name__} failed on the meta device, where {called} has no "
                f"values to read ({type(error).__name__}: {error}). Let it draw the weight without reading it, or "
                "name the weight in dense=[...]."
            ) from error
        replaced = module.get_parameter(name) is not weight
    if replaced:
        raise _Refused(called, "replaces the parameter")
    if not recorder.steps:
        raise _Refused(called, "does not write the weight")
    if not recorder.drawn:
        raise _Refused(called, "only changes values that the weight has already")
    return Recorded(tuple(recorder.steps))


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """Return the method with which a module initialises itself: `reset_parameters`, or `_reset_parameters`."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(found := getattr(module, name, None)):
            return found
    return None


class _Refused(ValueError):
    """A weight whose values cannot be drawn one by one."""

    def __init__(self, called, what):
        super().__init__(
            f"The active values of {called} cannot be drawn by themselves: its reset_parameters() {what}. Draw every "
            "entry alike there (kaiming_uniform_, xavier_normal_, trunc_normal_, ...), or name the weight in "
            "dense=[...]."
        )


class _Recorder(TorchDispatchMode):
    """Note the in-place operations on a weight, without running them."""

    def __init__(self, weight, called):
        super().__init__()
        self.weight, self.called = weight.detach(), called
        self.steps: list[Step] = []
        self.drawn = False  # whether the first step gives values

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [tensor for tensor in _written(func, args, kwargs) if self.holds(tensor)]
        if not written:
            return func(*args, **kwargs)
        target, name = written[0], func._schema.name
        if len(written) > 1 or not args or args[0] is not target or not _is_entrywise(func):
            raise _Refused(self.called, f"calls {name.removeprefix('aten::')}, which treats entries differently")
        if target.numel() != self.weight.numel():
            raise _Refused(self.called, f"calls {name.removeprefix('aten::')} for a part of it, {tuple(target.shape)}")
        others = [value for value in tree_leaves((args[1:], kwargs)) if isinstance(value, Tensor)]
        if any(other.dim() or other.is_meta for other in others):
            raise _Refused(self.called, f"calls {name.removeprefix('aten::')} with values from other tensors")
        self.note(partial(_apply, func, args[1:], kwargs), name in DRAWING)
        return target

    def note(self, step: Step, drawing: bool) -> None:
        """Note an operation; `drawing` tells whether it gives new values."""
        self.drawn = self.drawn or (drawing and not self.steps)
        self.steps.append(step)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is the weight, or a view of it."""
        return _share_memory(self.weight, tensor)


class _NotMeta(TorchFunctionMode):
    """Deny that a weight is on the meta device: orthogonal_ and others of torch.nn.init skip tensors that are."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_meta.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return not _share_memory(self.weight, args[0]) and func(*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _truncated_normals(recorder: _Recorder) -> Iterator[None]:
    """Note calls of trunc_normal_ as one operation: it draws until no entry is outside, so that no list can repeat it.

    No mode of torch sees the call, hence the function itself is exchanged.
    """
    original: Any = nn.init._no_grad_trunc_normal_

    def noted(tensor, mean, std, a, b, generator=None):
        if not recorder.holds(tensor):
            return original(tensor, mean, std, a, b, generator=generator)
        if tensor.numel() != recorder.weight.numel():
            raise _Refused(recorder.called, f"calls trunc_normal_ for a part of it, {tuple(tensor.shape)}")
        recorder.note(partial(original, mean=mean, std=std, a=a, b=b, generator=generator), True)
        return tensor

    nn.init._no_grad_trunc_normal_ = noted
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = original


def _share_memory(tensor, other):
    return torch._C._is_alias_of(tensor, other)  # pyright: ignore[reportAttributeAccessIssue]


def _apply(func, args, kwargs, values):
    return func(values, *args, **kwargs)


def _is_entrywise(func):
    return func._schema.name in DRAWING | UNTAGGED or torch.Tag.pointwise in func.tags


def _written(func, args, kwargs):
    """Return the tensors that an operation writes."""
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    into = [given.get(each.name) for each in arguments if each.alias_info is not None and each.alias_info.is_write]
    return [tensor for tensor in tree_leaves(into) if isinstance(tensor, Tensor)]


@contextmanager
def _on_meta(module: nn.Module) -> Iterator[None]:
    """Exchange all parameters and buffers of a module for ones on the meta device; put them back at the end."""
    stores: list[dict[str, Any]] = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    before = [dict(store) for store in stores]
    copies: dict[int, Tensor] = {}
    for store in stores:
        for name, tensor in store.items():
            if tensor is not None:
                store[name] = copies.setdefault(id(tensor), _meta_copy(tensor))
    try:
        yield
    finally:
        for store, held in zip(stores, before, strict=True):
            store.clear()
            store.update(held)


def _meta_copy(tensor):
    copy = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
