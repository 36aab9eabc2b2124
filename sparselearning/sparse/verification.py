"""Does a changed model still compute what it did? And if not, which change is to blame?"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from sparselearning.sparse.memory_order import LANES, is_batch_last
from sparselearning.sparse.trees import DATA, Arguments, arguments_of, copied, fresh, leaves, of_batch, redrawn

Item = TypeVar("Item")
LIMIT = 1 << 22  # numbers in the images of a third input
MOST_RUNS = 64  # checks of one search
FEW = 1000  # one of so many integers may differ: the other side of a tie


class Verifier:
    """What a model gives on an example, on a second input, and on a batch that sparse layers turn in memory.

    `refused` says why the model cannot be verified, or is empty. `verified` says on what models are compared.
    """

    def __init__(self, model: nn.Module, example_input: Any):
        self.example = copied(arguments_of(example_input))
        self.calls: Counter[int] = Counter()  # by the module's place in model.modules()
        expected = self.first_run(model)
        self.expected = {"the example": (self.example, expected)}
        self.skipped = ""
        self.refused = self.why_refused(model, expected)
        if not self.refused:
            self.add_second(model)
            self.add_batch(model)

    @property
    def verified(self) -> str:
        if self.refused:
            return f"not verified: {self.refused}"
        return "outputs equal on " + ", ".join(self.expected) + (f" ({self.skipped})" if self.skipped else "")

    def first_run(self, model: nn.Module) -> list[tuple[str, Any]]:
        model = fresh(model)
        places = {module: place for place, module in enumerate(model.modules())}
        hook = register_module_forward_pre_hook(lambda module, _: self.calls.update([places.get(module, -1)]))
        try:
            return run(model, self.example)
        finally:
            hook.remove()

    def why_refused(self, model: nn.Module, expected: list[tuple[str, Any]]) -> str:
        if why := difference(expected, expected):
            return why
        if not any(has_numbers(leaf) for _, leaf in expected):
            return "the model returns no finite numbers on the example"
        if why := difference(expected, run(fresh(model), self.example)):
            return f"the model gives other outputs when it runs again ({why})"
        return ""

    def add_second(self, model: nn.Module) -> None:
        self.skipped = "no second input: nothing to draw"
        for integers in (True, False):
            second = redrawn(self.example, integers)
            if second is None:
                continue
            try:
                self.expected["a second input"] = (second, run(fresh(model), second))
            except Exception as error:  # the caller's model may raise anything on inputs that it does not expect
                self.skipped = f"no second input: the model raised {type(error).__name__}"
                continue
            self.skipped = ""
            return

    def add_batch(self, model: nn.Module) -> None:
        """Add a batch that sparse layers turn in memory, if the example is none."""
        turned = of_batch(self.example, LANES, LIMIT)
        tensors = [leaf for _, leaf in leaves(self.example) if isinstance(leaf, Tensor)]
        if turned is None or any(tensor.dim() == 4 and is_batch_last(len(tensor)) for tensor in tensors):
            return
        try:
            self.expected[f"a batch of {LANES}"] = (turned, run(fresh(model), turned))
        except Exception:  # a model for one batch size
            return

    def difference(self, model: nn.Module) -> str:
        """Return how the outputs of `model` differ, or what it raises; an empty text if they are equal."""
        for name, (arguments, expected) in self.expected.items():
            try:
                why = difference(expected, run(fresh(model), arguments))
            except Exception as error:  # what a changed model raises is the answer
                why = f"it raises {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if why:
                return f"on {name} {why}"
        return ""


def has_numbers(leaf: Any) -> bool:
    """Return whether a leaf holds a number that is neither infinite nor nan."""
    numbers = isinstance(leaf, int | float | np.number) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf")
    return bool(torch.as_tensor(leaf).isfinite().any()) if numbers or isinstance(leaf, Tensor) else False


def run(model: nn.Module, arguments: Arguments) -> list[tuple[str, Any]]:
    """Run `model` on a copy of the arguments; return (path, leaf) of what it returns."""
    args, kwargs = copied(arguments)
    outputs = model(*args, **kwargs)
    return [(path, snapshot(leaf)) for path, leaf in leaves(outputs)]


def snapshot(leaf: Any) -> Any:
    """Return a leaf that later runs do not change."""
    if not isinstance(leaf, Tensor):
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    leaf = leaf.detach()
    if leaf.is_nested:
        leaf = leaf.to_padded_tensor(0.0)
    if leaf.is_quantized:
        leaf = leaf.dequantize()
    return leaf.clone() if leaf.layout == torch.strided else leaf.to_dense()


def difference(expected: Sequence[tuple[str, Any]], got: Sequence[tuple[str, Any]]) -> str:
    """Return how outputs differ beyond rounding; an empty text if they do not."""
    if [path for path, _ in expected] != [path for path, _ in got]:
        return "the outputs have another structure"
    for (path, one), (_, other) in zip(expected, got, strict=True):
        if why := leaf_difference(one, other):
            return f"output{path} {why}"
    return ""


def leaf_difference(one: Any, other: Any) -> str:
    if not isinstance(one, DATA):
        return f"is a {type(one).__name__}, which cannot be compared"
    if type(one) is not type(other):
        return f"is a {type(other).__name__}, not a {type(one).__name__}"
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.dtype.kind not in "biufc":
            return "" if one.dtype == other.dtype and np.array_equal(one, other) else "differs"
        return tensor_difference(torch.from_numpy(one), torch.from_numpy(other))
    if isinstance(one, float | np.floating):
        return tensor_difference(torch.tensor(float(one)), torch.tensor(float(other)))
    if isinstance(one, Tensor):
        return tensor_difference(one, other)
    return "" if one == other else "differs"


def tensor_difference(one: Tensor, other: Tensor) -> str:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return f"is {other.dtype} of shape {tuple(other.shape)}, not {one.dtype} of shape {tuple(one.shape)}"
    if one.is_contiguous() and not other.is_contiguous():
        return "is not contiguous in memory, so .view() would fail"
    if not one.numel():
        return ""
    if not (one.is_floating_point() or one.is_complex()):
        count = int((one != other).sum())
        return f"differs in {count} of {one.numel()} entries" if count > one.numel() // FEW else ""
    precision = torch.finfo(one.dtype).eps
    one, other = (torch.view_as_real(x) if x.is_complex() else x for x in (one, other))
    one, other = one.double(), other.double()
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()) or not torch.equal(
        one[~finite].nan_to_num(math.pi), other[~finite].nan_to_num(math.pi)
    ):
        return "is infinite or not a number in other places"
    one, other = one[finite], other[finite]
    error = (one - other).abs()
    allowed = math.sqrt(precision) * (one.abs() + scale_of(one)) + 10 * precision
    return f"differs by {error.max().item():.2g}" if (error > allowed).any() else ""


def scale_of(values: Tensor) -> float:
    """Return the largest size of values that are alike; the 1e9 or so of masked entries is none."""
    sizes = values.abs()
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 0.0
    small = sizes.kthvalue(1 + (len(sizes) - 1) // 10).values
    return sizes[sizes <= 1e4 * small].max().item()


def keep_what_works(
    items: Sequence[Item],
    differs: Callable[[list[Item]], str],
    alternatives: Callable[[Item], Iterable[Item]] | None = None,
    most_runs: float = math.inf,
) -> tuple[list[Item], dict[Item, str]] | None:
    """Return the items that work together, and what was wrong with each of the others; None after `most_runs` checks.

    All are tried at once. Where they do not work they are halved, down to single ones; a single one that does not work
    beside those found so far gives way to the first of its alternatives that does.
    """
    accepted: list[Item] = []
    rejected: dict[Item, str] = {}
    groups: list[tuple[list[Item], list[Item]]] = [(list(items), [])] if items else []  # each with its left half
    runs = 0
    while groups:
        group, left = groups.pop()
        half = len(group) // 2
        if half and left and set(left) <= set(accepted):  # then the fault lies here
            groups += [(group[half:], group[:half]), (group[:half], [])]
            continue
        if runs >= most_runs:
            return None
        runs += 1
        why = differs([*accepted, *group])
        if not why:
            accepted += group
        elif half:
            groups += [(group[half:], group[:half]), (group[:half], [])]
        else:
            rejected[group[0]] = why
            others = alternatives(group[0]) if alternatives else ()
            accepted += first(other for other in others if not differs([*accepted, other]))
    return accepted, rejected


def first(items: Iterable[Item]) -> list[Item]:
    """Return the first item, or none."""
    return list(itertools.islice(items, 1))
