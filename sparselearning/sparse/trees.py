"""Copies of models and of their inputs, and what outputs hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from sparselearning.sparse.modules import SparseModule

T = TypeVar("T")
Arguments = tuple[tuple, dict[str, Any]]
DATA = (Tensor, np.ndarray, np.generic, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CODE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)


def arguments_of(example_input: Any) -> Arguments:
    """Return the arguments and the keyword arguments of one call of a model.

    A tuple holds the arguments, a mapping the keyword arguments; anything else is the only argument, and so is a named
    tuple. A model that takes one tuple or one dict has the example (it,).
    """
    if type(example_input) is tuple:
        return example_input, {}
    if isinstance(example_input, Mapping):
        if not all(isinstance(name, str) for name in example_input):
            raise TypeError(
                "A dict as example_input holds keyword arguments by name; got a key that is not a string. "
                "For a model whose only argument is a dict, pass the tuple (that dict,)."
            )
        return (), dict(example_input)
    return (example_input,), {}


def copied(thing: T, what: str = "the input") -> T:
    """Return a deep copy. Tensors with a history are copied without it.

    Raises:
        TypeError: if `thing` cannot be copied.
    """
    memo: dict[int, Any] = {}
    for value in attributes(thing) if isinstance(thing, nn.Module) else [thing]:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and (leaf.is_inference() or (leaf.requires_grad and not leaf.is_leaf)):
                memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(thing, memo)
    except Exception as error:
        raise TypeError(
            f"Expected {what} that copy.deepcopy can copy, got a {type(thing).__name__} where it fails: {error}. "
            "Take out what cannot be copied, pass the model inside a wrapper (such as DDP's .module), "
            "or give the class a __deepcopy__."
        ) from error


def attributes(model: nn.Module) -> list[Any]:
    """Return the attributes of all modules that are no parameters, buffers or modules."""
    held = ("_parameters", "_buffers", "_modules")
    return [value for module in model.modules() for name, value in vars(module).items() if name not in held]


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the caller's model, in eval mode; nothing of it is the caller's.

    Raises:
        TypeError: if it is no model, or cannot be copied.
        ValueError: if lazy modules have no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model, an nn.Module, got a {type(model).__name__}. Pass the model itself.")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise ValueError(f"Expected a model with weights, got lazy ones ({lazy[0]}). Run the model once before.")
    own = copied(model, "a model")
    theirs = {id(module) for module in model.modules()}
    if shared := [name for name, module in own.named_modules() if id(module) in theirs]:
        raise TypeError(
            f"Expected a model whose copy is a new one, got a __deepcopy__ that returns the same module "
            f"({shared[0] or type(model).__name__}). Let it return a copy."
        )
    for module in list(own.modules()):
        for name, part in module.named_children():
            if hasattr(part, "_orig_mod"):
                setattr(module, name, part._orig_mod)
    return own.eval()


def fresh(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its parameters. A run changes the copy's buffers and attributes."""
    shared = {id(tensor): tensor for tensor in model.parameters()}
    for module in model.modules():
        if isinstance(module, SparseModule):
            shared |= {id(tensor): tensor for tensor in module.buffers(recurse=False)}
    return copy.deepcopy(model, dict[int, Any](shared))


@contextmanager
def alone():
    """Run without gradients, and leave all random-number generators of the CPU as they are."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def leaves(tree: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for what `tree` holds: items of containers, and attributes of any other objects."""
    if isinstance(tree, DATA):
        yield path, tree
    elif id(tree) in above or isinstance(tree, CODE):
        return
    else:
        parts = parts_of(tree)
        if parts is None:
            yield path, tree
            return
        for name, part in parts:
            yield from leaves(part, path + name, (*above, id(tree)))


def parts_of(tree: Any) -> list[tuple[str, Any]] | None:
    """Return (name, part) of a container or object; None if it shows nothing of what it holds."""
    if isinstance(tree, Mapping):
        return [(f"[{name!r}]", part) for name, part in tree.items()]
    if isinstance(tree, set | frozenset):
        return [("{}", part) for part in sorted(tree, key=repr)]
    if isinstance(tree, Sequence):
        return [(f"[{index}]", part) for index, part in enumerate(tree)]
    if isinstance(tree, nn.Module):
        return []
    slots = [slot for kind in type(tree).__mro__ for slot in as_tuple(getattr(kind, "__slots__", ()))]
    if not hasattr(tree, "__dict__") and not slots:
        return None
    parts = {**{slot: getattr(tree, slot) for slot in slots if hasattr(tree, slot)}, **getattr(tree, "__dict__", {})}
    return [(f".{name}", part) for name, part in parts.items()]


def as_tuple(names: Any) -> tuple:
    return (names,) if isinstance(names, str) else tuple(names)


def redrawn(arguments: Arguments, integers: bool) -> Arguments | None:
    """Return arguments with other values in the range of each tensor; None if none is to be redrawn.

    Integers are drawn between the smallest and the largest, if `integers`. Kept are bool tensors, scalars, and float
    tensors that look like masks (two values, or infinite ones).
    """
    arguments = copied(arguments)
    generator = torch.Generator().manual_seed(4_208_317)  # hardly the seed of the example
    tensors = {id(leaf): leaf for _, leaf in leaves(arguments) if isinstance(leaf, Tensor)}
    changed = [redraw(tensor, integers, generator) for tensor in tensors.values()]
    return arguments if any(changed) else None


def redraw(tensor: Tensor, integers: bool, generator: torch.Generator) -> bool:
    """Give a tensor other values, in place; return whether that was possible."""
    kept = tensor.dtype == torch.bool or tensor.is_complex() or tensor.is_quantized or tensor.is_nested
    if kept or tensor.layout != torch.strided or not tensor.dim() or not tensor.numel() or 0 in tensor.stride():
        return False
    if not tensor.is_floating_point():
        if not integers:
            return False
        low, high = int(tensor.min()), int(tensor.max())
        tensor.copy_(torch.randint(low, high + 1, tensor.shape, generator=generator))
        return low < high
    values = tensor.flatten().double()
    low, high = values.min(), values.max()
    if not values.isfinite().all() or (low < high and ((values == low) | (values == high)).all()):
        return False
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    span = (high - low).item() or 2.0
    tensor.copy_(drawn * span + (low.item() if low < high else low.item() - 1))
    return True


def of_batch(arguments: Arguments, batch: int, limit: int) -> Arguments | None:
    """Return the arguments with their images repeated to `batch`; None without images, or beyond `limit` numbers."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    images = next((tensor for tensor in tensors if tensor.dim() == 4 and len(tensor)), None)
    if images is None or batch * images[0].numel() > limit:
        return None

    def repeat(leaf):
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != len(images):
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % len(leaf)]

    return tree_map(repeat, arguments)
