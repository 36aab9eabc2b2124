"""Models that were built on the meta device: real parameters and buffers for all but the weights that stay compact."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparselearning.sparse.recorded import reset_of

Compact = Collection[tuple[nn.Module, str]]


class _Place(NamedTuple):
    """Where a module holds a tensor."""

    path: str
    module: nn.Module
    name: str
    tensor: Tensor

    @property
    def called(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def materialise(root: nn.Module, compact: Compact) -> dict[nn.Parameter, nn.Parameter]:
    """Give `root` real parameters and buffers on the CPU for those on the meta device; return {old: new parameter}.

    `compact` are the (module, name) of weights that stay on the meta device. Every other tensor keeps its shape, dtype
    and requires_grad, and is initialised by the `reset_parameters` (or `_reset_parameters`) of the module that holds
    it, once, parts before the modules that contain them. A tensor that several modules hold stays one, with the values
    of the first of them. Tensors that were real keep their values. Methods of modules that hold no such tensor
    themselves, such as nn.Transformer's, are not called, nor are conventions like `_init_weights`.

    The caller exchanges the parameters in the optimizer.

    Raises:
        ValueError: for modules without such a method, or whose method fails or leaves a tensor unwritten (a buffer that
            was computed in __init__); the message names all of them, and nothing has changed.
    """
    places = _on_meta(root, compact)
    _refuse_without_reset(places)
    new = {id(place.tensor): _real(place.tensor) for place in places}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (store, dict(store)) for part in root.modules() for store in (part._parameters, part._buffers)
    ]
    try:
        for place in places:
            setattr(place.module, place.name, new[id(place.tensor)])
        with _kept(places, new):
            _reset(places)
        _refuse_unwritten(places, new)
    except BaseException:
        for place in places:
            setattr(place.module, place.name, place.tensor)  # tells nn.LSTM, too
        for store, held in before:
            store.clear()
            store.update(held)
        raise
    return {
        place.tensor: getattr(place.module, place.name)
        for place in reversed(places)
        if isinstance(place.tensor, nn.Parameter)
    }


def _on_meta(root, compact):
    """Return the places of all tensors on the meta device that do not stay there, in the order of the modules."""
    stays = {id(module.get_parameter(name)) for module, name in compact}
    return [
        _Place(path, module, name, tensor)
        for path, module in root.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and tensor.is_meta and id(tensor) not in stays
    ]


def _refuse_without_reset(places):
    initialised = {id(place.tensor) for place in places if reset_of(place.module)}
    unknown = [place for place in places if id(place.tensor) not in initialised]
    if unknown:
        names = ", ".join(f"{place.called} of {type(place.module).__name__}" for place in unknown)
        raise ValueError(
            f"Nothing says how these tensors on the meta device start: {names}. Give their modules a method "
            "reset_parameters() that writes all of them, or build these modules on the CPU (with torch.device('cpu'))."
        )


def _refuse_unwritten(places, new):
    """Raise if a tensor that still belongs to a module was not written."""
    unwritten = []
    for place in places:
        tensor = getattr(place.module, place.name)
        if (tensor is new[id(place.tensor)] or tensor.is_meta) and not _is_written(tensor):
            computed = place.name in place.module._non_persistent_buffers_set
            unwritten.append(f"{place.called} of {type(place.module).__name__}" + computed * " (in no state_dict)")
    if unwritten:
        raise ValueError(
            f"reset_parameters() leaves tensors on the meta device as they are: {', '.join(unwritten)}. What __init__ "
            "computed is not known any more: write it in reset_parameters(), or build these modules on the CPU (with "
            "torch.device('cpu'))."
        )


def _is_written(tensor):
    if tensor.is_meta:
        return False
    return not tensor.isnan().any() if _marks_unwritten(tensor) else tensor._version > 0


def _marks_unwritten(tensor):
    """Tell whether entries can be NaN until they are written; of others torch counts the writes."""
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1


def _real(tensor):
    """Return a tensor on the CPU like one on the meta device, not initialised yet."""
    real = torch.empty_like(tensor, device="cpu", requires_grad=False)
    if _marks_unwritten(real):
        real.fill_(math.nan)
    if not isinstance(tensor, nn.Parameter):
        return real.requires_grad_(tensor.requires_grad)
    parameter = nn.Parameter(real, tensor.requires_grad)
    for name, value in vars(tensor).items():
        setattr(parameter, name, value)
    return parameter


def _reset(places):
    """Let every module that holds one of the tensors initialise itself, parts before the whole."""
    modules = {id(place.module): place for place in reversed(places)}
    for place in modules.values():
        reset = reset_of(place.module)
        try:
            if reset is not None:
                with torch.device("cpu"):
                    reset()
        except Exception as error:  # a user's function raises what it likes
            raise ValueError(
                f"reset_parameters() of {place.path or 'the model'} ({type(place.module).__name__}) failed "
                f"({type(error).__name__}: {error}). Weights that stay compact are on the meta device while it runs."
            ) from error


@contextmanager
def _kept(places: list[_Place], new: dict[int, Tensor]) -> Iterator[None]:
    """Let modules initialise copies of all tensors that are not new, and put the tensors themselves back."""
    parts = {id(part): part for place in places for part in place.module.modules()}
    made = {id(tensor) for tensor in new.values()}
    copies: dict[int, Tensor] = {}
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    for part in parts.values():
        stores: list[dict[str, Any]] = [part._parameters, part._buffers]
        for store in stores:
            held += [(store, name, x) for name, x in store.items() if x is not None and id(x) not in made]
    for store, name, tensor in held:
        store[name] = copies.setdefault(id(tensor), _copy(tensor))
    try:
        yield
    finally:
        for store, name, tensor in held:
            store[name] = tensor


def _copy(tensor):
    copy = tensor.detach().clone()
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
