"""Dense tensors that are computed when somebody asks for them, and remember where they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = torch._C.DisableTorchFunctionSubclass  # pyright: ignore[reportPrivateImportUsage]


class OnDemand(Tensor):
    """A dense tensor that was computed from active entries, or a view of one.

    What is written into it goes where it came from. Operations return plain tensors; views of it are as it is.
    """

    source: Tensor  # all of the dense tensor, as a plain one
    write: Callable[[Tensor], None]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with PLAIN():
            result = func(*args, **(kwargs or {}))
            target = _target(func, args, kwargs or {})
            if isinstance(target, OnDemand):
                target.write(target.source)
            origin = next((each for each in args if isinstance(each, OnDemand)), None)
            if origin is not None and isinstance(result, Tensor) and _is_part(result, origin.source):
                return on_demand(result, origin.write, origin.source)
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        return plain(self).clone()

    def __reduce_ex__(self, protocol: Any):
        return plain(self).__reduce_ex__(protocol)


def on_demand(part: Tensor, write: Callable[[Tensor], None], source: Tensor | None = None) -> Tensor:
    """Return a dense tensor, or a view of one (`source`), which calls `write(source)` after it has been written."""
    shown = part.as_subclass(OnDemand)
    shown.source, shown.write = plain(part) if source is None else source, write
    return shown


def plain(tensor: Tensor) -> Tensor:
    """Return the same tensor as one of torch's own."""
    with PLAIN():
        return tensor.as_subclass(Tensor)


def _is_part(tensor, source):
    return tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def _target(func, args, kwargs):
    """Return the tensor that a function writes, if it writes one."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or (name.startswith("__i") and name.endswith("__") and name != "__invert__")
    if in_place or (name.endswith("_") and not name.endswith("__")):
        return args[0]
    return kwargs.get("out")
