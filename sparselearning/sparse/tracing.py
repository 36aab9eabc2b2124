"""Models as programs: what torch.export sees of a model, as steps that JSON can hold (programs.py)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves

from sparselearning.sparse.programs import OBJECTS, ON_SIZES, described, operator_of, rebuilt
from sparselearning.sparse.trees import Arguments, arguments_of, copied

EXAMPLES: weakref.WeakKeyDictionary[nn.Module, Arguments] = weakref.WeakKeyDictionary()  # of converted models
NAMES = {function: name for name, function in ON_SIZES.items()}
LAYERS = {"sparselearning.conv2d.default", "sparselearning.conv2d_plain.default", "sparselearning.linear.default"}
STATE = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}


def keep_example(model: nn.Module, example_input: Any) -> None:
    """Remember what a model was converted with, as long as there is the model."""
    EXAMPLES[model] = copied(arguments_of(example_input))


def example_of(model: nn.Module, example_input: Any) -> Arguments:
    """Return the arguments to trace a model with.

    Raises:
        ValueError: if none are given, and none are known.
    """
    if example_input is not None:
        return copied(arguments_of(example_input))
    if model not in EXAMPLES:
        raise ValueError(
            "Expected a model that convert returned; a copy of it, or any other model, needs an example of its input: "
            "save(model, path, example_input)."
        )
    return copied(EXAMPLES[model])


class Flat(nn.Module):
    """A model that takes tensors and returns tensors; `tell` is called with the nesting in which it returned them."""

    def __init__(self, model: nn.Module, takes: dict[str, Any], tell: Callable[[dict[str, Any]], None]):
        super().__init__()
        self.model, self.takes, self.tell = model, takes, tell

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = rebuilt(self.takes, tensors)
        results: list[Tensor] = []
        self.tell(described(self.model(*args, **kwargs), results))
        return tuple(results)


def rows_of(arguments: Arguments) -> int:
    """Return the number of rows of a batch: the first dimension of the first tensor that has one; 0 without any."""
    return next((len(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def with_rows(tensors: list[Tensor], own: int, rows: int) -> list[Tensor]:
    """Return tensors with another number of rows, repeated or left out, where they have `own` rows."""
    return [x[torch.arange(rows) % own] if own and x.dim() and len(x) == own else x for x in tensors]


def traced(model: nn.Module, takes: dict[str, Any], tensors: list[Tensor], rows: int) -> tuple[Any, dict[str, Any]]:
    """Return what torch.export makes of a model, and the nesting of what the model returns.

    It takes any number of rows where the tensors have `rows`; only theirs if that is 0.

    Raises:
        ValueError: if torch cannot trace it.
    """
    if rows == 1:
        tensors, rows = with_rows(tensors, 1, 2), 2  # torch takes a single row for a fixed number
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if rows and x.dim() and len(x) == rows else None for x in tensors)
    returned: list[dict[str, Any]] = []
    flat = Flat(model, takes, lambda nesting: returned.append(nesting))  # torch.export undoes what attributes take
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.export's own parts
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=(shapes,), strict=False)
            return program.run_decompositions({}), returned[-1]
    except Exception as error:  # torch raises any type, and so does the model
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if not rows:
            raise ValueError(f"torch.export cannot trace the model: {why}") from error
        raise ValueError(
            f"torch.export cannot trace the model for any number of rows: {why.partition('! For more')[0]}. Take the "
            "number from x.shape[0], not len(x), or save the model for the rows of the example: dynamic_batch=False, "
            "as torch before 2.8 needs for convolutions and attention."
        ) from error


class Description:
    """A traced model in the form that a file holds: steps, stored tensors, and the indices of sparse layers."""

    def __init__(self, program: Any):
        self.program = program
        self.tensors: list[Tensor] = []
        self.layers: list[tuple[Tensor, Tensor, int, int]] = []  # start, column, width of a row, length of t_start
        self.steps: list[list[Any]] = []
        self.results: list[Any] = []
        self.places: dict[Any, dict[str, Any]] = {}  # what refers to the result of a node
        self.held: dict[str, Tensor] = {}  # placeholder -> stored tensor
        self.known: dict[Any, int] = {}
        self.check_outputs()
        inputs = 0
        for node, spec in zip(placeholders(program), program.graph_signature.input_specs, strict=True):
            if spec.kind in STATE:
                self.held[node.name] = tensor_of(program, spec.target)
            elif spec.kind is InputKind.USER_INPUT:
                self.places[node] = {"input": inputs}
                inputs += 1
            else:
                raise ValueError(f"The model holds {spec.target!r}, which is no tensor and cannot be saved.")
        for node in program.graph.nodes:
            self.add(node)

    def check_outputs(self) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise ValueError(
                    f"The model writes {spec.target or 'an input'!r} when it runs; only a model whose calls leave "
                    "everything as it was can be saved. Put it in eval mode, or return what it would write."
                )

    def add(self, node: Any) -> None:
        if node.op == "output":
            self.results = self.argument(node.args[0])
        elif node.op == "call_function":
            name = NAMES.get(node.target, str(node.target))
            try:
                operator_of(name)
            except ValueError as error:
                raise ValueError(f"The model cannot be saved: {error}") from None
            args = self.layer_arguments(node) if name in LAYERS else node.args
            named = [[key, self.argument(part)] for key, part in node.kwargs.items()]
            self.places[node] = {"step": len(self.steps)}
            self.steps.append([name, self.argument(args), named])
        elif node.op != "placeholder":
            raise ValueError(f"The model cannot be saved: {node.target!r} is control flow that depends on numbers.")

    def layer_arguments(self, node: Any) -> list[Any]:
        """Return the arguments of a sparse layer, its indices as one."""
        x, value, bias, start, column, t_start, _, _, *rest = node.args
        start, column, planes = self.held[start.name], self.held[column.name], len(self.held[t_start.name]) - 1
        width = planes
        if len(rest) > 1:
            kernel, stride, _, _, groups, _ = rest
            width = planes // (stride[0] * stride[1] * groups) * kernel[0] * kernel[1]
        key = (start.data_ptr(), column.data_ptr(), len(column), planes)
        if key not in self.known:
            self.known[key] = len(self.layers)
            self.layers.append((start, column, width, planes + 1))
        return [x, value, bias, Layer(self.known[key]), *rest]

    def argument(self, given: Any) -> Any:
        """Return an argument of a node in the form that JSON holds."""
        if isinstance(given, list | tuple):
            return [self.argument(part) for part in given]
        if isinstance(given, Layer):
            return {"layer": given.index}
        if isinstance(given, torch.fx.Node):
            return {"tensor": self.stored(self.held[given.name])} if given.name in self.held else self.places[given]
        if given is None or isinstance(given, bool | int | float | str):
            return given
        if isinstance(given, torch.device) and given.type == "cpu":
            return {"device": "cpu"}
        for kind, of_torch in OBJECTS.items():
            if isinstance(given, of_torch):
                return {kind: str(given).removeprefix("torch.")}
        raise ValueError(f"The model cannot be saved: an operator is given {given!r}, of {type(given).__name__}.")

    def stored(self, tensor: Tensor) -> int:
        """Return the place of a tensor among those of the file; one that is used twice is stored once."""
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if key not in self.known:
            self.known[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self.known[key]

    def batch(self) -> list[int | None]:
        """Return the smallest and the largest number of rows; None for any."""
        ranges = [*self.program.range_constraints.values()]
        if not ranges:
            return [0, None]
        return [max(int(each.lower) for each in ranges), least_upper(ranges)]


class Layer:
    """The indices of a sparse layer, in the arguments of a step."""

    def __init__(self, index: int):
        self.index = index


def placeholders(program: Any) -> list[Any]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def tensor_of(program: Any, name: str) -> Tensor:
    """Return a parameter, buffer or constant of a traced model."""
    return (program.state_dict[name] if name in program.state_dict else program.constants[name]).detach()


def check_state(model: nn.Module) -> None:
    """Raise a ValueError if a model holds tensors that no file holds."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_cpu or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(
                f"Expected dense tensors on the CPU, got {name!r} as {tensor.layout} on {tensor.device}. "
                "Move the model to the CPU, and convert it there."
            )


def least_upper(ranges: list[Any]) -> int | None:
    """Return the smallest upper end of value ranges; None if they have none."""
    ends = [int(each.upper) for each in ranges if getattr(each.upper, "is_Integer", False)]
    return min(ends, default=None)
