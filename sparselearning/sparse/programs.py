"""Programs without code: steps that are operators of torch and of this package, on stored tensors.

A program is described by what JSON holds: its steps, each as [operator, arguments, [name, argument] pairs], and the
nesting of what it takes and returns. In an argument `{"step": 3}` stands for what another step gave, `{"input": 0}` for
a tensor that the caller gives, `{"tensor": 5}` for a stored one, `{"layer": 1}` for the indices of a sparse layer, and
`{"dtype": "float32"}` and the like for torch's own constants.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from sparselearning.sparse import ops
from sparselearning.sparse.fusing import ADDED, CONVOLUTIONS, fused, steps_in
from sparselearning.sparse.memory_order import is_turned, to_batch_first
from sparselearning.sparse.planning import Plans
from sparselearning.sparse.plans import Slot, filled
from sparselearning.sparse.pointwise import is_pointwise, product
from sparselearning.sparse.pooling import BatchLastAdaptiveAvgPool2d, BatchLastAvgPool2d, BatchLastMaxPool2d

CONTAINERS = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}
NUMBERS = (type(None), bool, int, float, str)
OBJECTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
REFERENCES = {"step", "input", "layer", "tensor", "device", *OBJECTS}
ON_SIZES = {
    f"operator.{function.__name__}": function
    for function in (
        *(
            operator.getitem,
            operator.add,
            operator.sub,
            operator.mul,
            operator.floordiv,
            operator.mod,
            operator.truediv,
        ),
        *(operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    )
} | {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")}
OWN = ("conv2d", "conv2d_plain", "linear", "affine")
RISKY = ("from_file", "_unsafe_index", "_unsafe_masked", "tensor_unsafe")  # they touch files, or read without checks
READ_ORDER = ("as_strided", "sym_stride", "sym_storage_offset", "view.dtype", "view_as_real", "view_as_complex")


def described(tree: Any, tensors: list[Tensor]) -> dict[str, Any]:
    """Return the nesting of arguments or outputs; the tensors in it are appended to `tensors`.

    Raises:
        TypeError: for anything but tensors and numbers in tuples, lists and dicts with strings as keys.
    """
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return {"tensor": len(tensors) - 1}
    if type(tree) in NUMBERS:
        return {"number": tree}
    kind = type(tree).__name__
    if CONTAINERS.get(kind) is not type(tree):
        raise TypeError(f"Expected tensors and numbers in tuples, lists and dicts, got a {kind}.")
    if kind in ("tuple", "list"):
        return {kind: [described(part, tensors) for part in tree]}
    if not all(isinstance(key, str) for key in tree):
        raise TypeError("Expected dicts with strings as keys.")
    return {kind: {key: described(tree[key], tensors) for key in sorted(tree)}, "order": list(tree)}


def rebuilt(description: dict[str, Any], tensors: Sequence[Any]) -> Any:
    """Return the tree that `described` described."""
    kind = next(iter(description))
    inside = description[kind]
    if kind == "tensor":
        return tensors[inside]
    if kind == "number":
        return inside
    if kind in ("tuple", "list"):
        return CONTAINERS[kind](rebuilt(part, tensors) for part in inside)
    return CONTAINERS[kind]((key, rebuilt(inside[key], tensors)) for key in description["order"])


def operator_of(name: str) -> Callable[..., Any]:
    """Return the operator of a step.

    Raises:
        ValueError: if a program may not have it, or this version of torch does not.
    """
    if name in ON_SIZES:
        return ON_SIZES[name]
    package, kind, overload = (*name.split("."), "", "", "")[:3]
    if package == "sparselearning" and kind in OWN:
        return partial(ops.run, kind)
    found = getattr(getattr(torch.ops.aten, kind, None), overload, None) if package == "aten" else None
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"torch {torch.__version__} has no operator {name!r} that a program may call.")
    if found._schema.is_mutable or any(part in kind for part in RISKY):
        raise ValueError(f"The operator {name!r} changes what it is given, or reads files; no program may call it.")
    return found


def in_any_order(name: str, step: Callable[..., Any], args: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
    """Return a step and its arguments, such that it takes and keeps images whose batch is last in memory."""
    x, *rest = args
    if name == "sparselearning.conv2d_plain.default":
        return partial(ops.run, "conv2d"), args
    if name in ("aten.view.default", "aten._unsafe_view.default"):
        return torch.ops.aten.reshape.default, args
    if name == "aten.max_pool2d.default" and not steps_in(rest):
        size, stride, padding, dilation, ceil_mode = [*rest, *([], 0, 1, False)[len(rest) - 1 :]]
        return BatchLastMaxPool2d(size, stride or size, padding, dilation, False, ceil_mode), [x]
    if name == "aten.avg_pool2d.default" and not steps_in(rest):
        size, stride, *others = [*rest, *([],)[len(rest) - 1 :]]
        return BatchLastAvgPool2d(size, stride or size, *others), [x]
    if name == "aten.conv2d.default":
        return partial(convolved, step), args
    if name == "aten.adaptive_avg_pool2d.default" and not steps_in(rest):
        return BatchLastAdaptiveAvgPool2d(*rest), [x]
    return step, args


def convolved(step: Callable[..., Any], x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Return the convolution that `step` computes of these arguments."""
    bias, stride, padding, _, groups = [*others, *(None, [1, 1], [0, 0], [1, 1], 1)[len(others) :]]
    y = product(x, weight, bias, tuple(_pair(stride))) if is_pointwise(weight, padding, groups) else None
    return step(x, weight, *others) if y is None else y


class Program:
    """A saved model: called as the model was, on a CPU, for inference. It takes as many threads as torch.

    `description` as the module says; `tensors` and `layers` are what its steps refer to.
    """

    def __init__(self, description: dict[str, Any], tensors: list[Tensor], layers: list[tuple[Tensor, ...]]):
        self.description = description
        self.stored = {"tensor": tensors, "layer": layers}
        self.size = sum(tensor.nbytes for tensor in [*tensors, *(part for layer in layers for part in layer)])
        steps = description["steps"]
        names = [name for name, _, _ in steps]
        any_order = not any(part in name for name in names for part in READ_ORDER)
        turning = any(name in CONVOLUTIONS for name in names)  # whether any step gives images whose batch is last
        numbered = enumerate(fused(steps, description["results"]) if any_order else steps)
        left = [(number, *step) for number, step in numbered if step is not None]
        last_use = {index: number for number, _, *given in left for index in steps_in(given)}
        done: dict[int, list[int]] = {number: [] for number, *_ in left}
        for index in last_use.keys() - set(steps_in(description["results"])):
            done[last_use[index]].append(index)
        self.steps = []
        for number, name, args, named in left:
            step = ops.conv2d_added if name == ADDED and any_order else operator_of(name)
            if any_order and args and not named and (turning or name != "aten.conv2d.default"):
                step, args = in_any_order(name, step, args)
            given = self.prepared(args), {key: self.prepared(part) for key, part in named}
            self.steps.append((number, step, *given, done[number]))
        self.results = self.prepared(description["results"])
        self.plans = Plans()

    def __repr__(self) -> str:
        return f"Program({self.expected()}; {len(self.steps)} steps, {self.size} bytes)"

    def expected(self) -> str:
        """Return the tensors that the program takes, in words."""
        return ", ".join(f"{each['dtype']} {shape_in_words(each['shape'])}" for each in self.description["inputs"])

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returned for such arguments.

        Raises:
            TypeError, ValueError: for arguments that are not like those that the model was saved with.
        """
        values: dict[Any, Any] = {}
        self.take(values, args, kwargs)
        if not self.plans.run(self, values):
            self.run(values)
        results = filled(self.results, values)
        return rebuilt(self.description["returns"], [to_batch_first(y) if is_turned(y) else y for y in results])

    def run(self, values: dict[Any, Any]) -> None:
        """Run the steps: put what they return into `values`, which has the inputs."""
        for number, step, given, named, done in self.steps:
            values[number] = step(*filled(given, values), **{key: filled(each, values) for key, each in named.items()})
            for index in done:
                del values[index]

    def take(self, values: dict[Any, Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the arguments of a call, and put their tensors where steps find them."""
        tensors: list[Tensor] = []
        given = described([args, kwargs], tensors)
        if in_one_order(given) != in_one_order(self.description["takes"]):
            raise TypeError(
                f"Expected arguments nested as in the example that the model was saved with: {self.expected()}; "
                f"got {', '.join(in_words(tensor) for tensor in tensors) or 'no tensors'}, nested otherwise."
            )
        batches = set()
        for index, (tensor, wanted) in enumerate(zip(tensors, self.description["inputs"], strict=True)):
            shape = wanted["shape"]
            batches |= {tensor.shape[0]} if shape[:1] == [None] and tensor.dim() else set()
            fits = len(shape) == tensor.dim() and all(
                size in (None, own) for size, own in zip(shape, tensor.shape, strict=True)
            )
            if not fits or str(tensor.dtype) != f"torch.{wanted['dtype']}" or not tensor.is_cpu:
                raise ValueError(
                    f"Expected input {index} as {wanted['dtype']} of shape {shape_in_words(shape)} on the CPU, "
                    f"got {in_words(tensor)} on {tensor.device}."
                )
            values["input", index] = tensor
        least, most = self.description["batch"]
        if len(batches) > 1 or any(batch < least or (most is not None and batch > most) for batch in batches):
            allowed = f"from {least} on" if most is None else f"from {least} to {most}"
            raise ValueError(f"Expected one number of rows, {allowed}, in all inputs; got {sorted(batches)}.")

    def prepared(self, given: Any) -> Any:
        """Return an argument of a step with stored tensors in place, and a `Slot` where a call puts something."""
        if isinstance(given, list):
            return [each for part in given for each in self.parts(part)]
        (only,) = self.parts(given)
        return only

    def parts(self, given: Any) -> list[Any]:
        """Return what one argument stands for: several ones for the indices of a layer."""
        if not is_reference(given):
            return [self.prepared(given) if isinstance(given, list) else given]
        ((kind, what),) = given.items()
        if kind == "step":
            return [Slot(what)]
        if kind == "input":
            return [Slot(("input", what))]
        if kind == "layer":
            return list(self.stored["layer"][what])
        if kind == "tensor":
            return [self.stored["tensor"][what]]
        if kind == "device":
            return [torch.device("cpu")]
        found = getattr(torch, what)
        if not isinstance(found, OBJECTS[kind]):
            raise ValueError(f"Expected a {kind}, got {what!r}.")
        return [found]


def is_reference(given: Any) -> bool:
    """Return whether this stands for something else: a dict of one kind of thing and what it is."""
    return isinstance(given, dict) and len(given) == 1 and next(iter(given)) in REFERENCES


def in_one_order(description: dict[str, Any]) -> Any:
    """Return a nesting without the order of its dicts, which does not matter to a call."""
    kind = next(iter(description))
    inside = description[kind]
    if kind in ("tuple", "list"):
        return kind, [in_one_order(part) for part in inside]
    return kind, {key: in_one_order(part) for key, part in inside.items()} if "order" in description else inside


def in_words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def shape_in_words(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("batch" if size is None else str(size) for size in shape) + ("," * (len(shape) == 1)) + ")"
