"""Patterns: which weights of a layer may be active together.

    mask.add_module(model, density=0.5, pattern="2:4")

Every pattern is one of two things, or both: a unit of selection, the weights that come and go together, and a limit on
the active units of each group. A mask carries its pattern, and the verbs of selection.py obey it, so that functions
for pruning and growth need not know of it.

A weight is seen as a matrix of outputs and inputs; the inputs of a convolution are (channels, height, width)
flattened, as torch's own sparse tensors take them.

    unstructured   single weights, no limit
    N:M            single weights, at most N of every M inputs in a row
    block:RxC      blocks of R outputs x C inputs
    fan-in         single weights, the same number for every neuron (output)
    fan-in:G       the same, where neurons that matter little are given up
    neuron         all inputs of a neuron, or of a convolution's output channel
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Blocks of `rows` x `columns` weights are the units; of every `group` units in a row `most` may be active.

    Constant fan-in (`even`; Lasby et al. 2024, Dynamic sparse training with structured sparsity, SRigL,
    https://arxiv.org/abs/2305.02299) has a neuron as its group, and every neuron that is active has the same number of
    inputs. With `ablation` G > 0 a neuron stays active only while G * `most` of its weights are salient: not pruned in
    an update, or among those that unstructured growth would add to the layer. Its weights go to the others, whose
    fan-in rises to the next whole number that the layer's weights allow. Unlike in the paper's code `most` is the
    fan-in at the start, and a neuron whose weights were all pruned is given up, too.
    """

    name: str = "unstructured"
    rows: int = 1
    columns: int = 1
    group: int = 1
    most: int | None = None
    even: bool = False
    ablation: float = 0.0

    @property
    def size(self) -> int:
        """Weights of a unit."""
        return self.rows * self.columns

    def step(self, shape: Sequence[int]) -> int:
        """Return how many weights a layer of this shape may have more, at the least."""
        return shape[0] if self.even else self.size

    def capacity(self, shape: Sequence[int]) -> int:
        """Return how many weights of a layer of this shape may be active."""
        size = math.prod(shape)
        return size if self.most is None else size // (self.size * self.group) * self.most * self.size

    def units(self, values: Tensor) -> Tensor:
        """Return the sum over every unit, in the shape (outputs / rows, inputs / columns); `values` for units of 1."""
        if self.size == 1:
            return values
        matrix = values.flatten(1)
        outputs, inputs = matrix.shape
        values = matrix.reshape(outputs // self.rows, self.rows, inputs // self.columns, self.columns)
        return values.sum(dim=(1, 3), dtype=None if values.is_floating_point() else torch.int32)

    def weights(self, units: Tensor, like: Tensor) -> Tensor:
        """Return for every weight of `like` what its unit is: the way back from `units`."""
        if self.size == 1:
            return units
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1).view(like.shape)

    def candidates(self, score: Tensor, active: Tensor) -> Tensor:
        """Return the inactive units that may become active: the best of each group, as many as it has room for."""
        if self.most is None:
            return ~active
        groups = active.reshape(-1, self.group)
        most = self.most
        if self.ablation:  # the neurons that are left share all weights
            left = _in_use(groups)
            most = self.most * len(groups) // left.sum() * left.unsqueeze(1)
        lowest = torch.finfo(score.dtype).min
        ranked = score.reshape(groups.shape).nan_to_num(nan=lowest, neginf=lowest).masked_fill(groups, -torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(self.group, device=active.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        room = most - groups.sum(1, keepdim=True)
        return ((rank < room) & ~groups).view(active.shape)

    def holds(self, mask: Tensor) -> Tensor:
        """Return whether a mask is of this pattern, a 0-d tensor."""
        if self.most is None:
            return self.whole(mask)
        counts = mask.reshape(-1, self.group).sum(1)
        if self.ablation:
            return ((counts == 0) | (counts == counts.max())).all()
        return (counts == self.most).all() if self.even else (counts <= self.most).all()

    def whole(self, mask: Tensor) -> Tensor:
        """Return whether every unit of a mask is active as a whole, or not at all; a 0-d tensor."""
        inside = self.units(mask)
        return ((inside == 0) | (inside == self.size)).all()


UNSTRUCTURED = Pattern()


def pattern_of(mask: Tensor) -> Pattern:
    """Return the pattern that a mask carries."""
    return getattr(mask, "pattern", UNSTRUCTURED)


def with_pattern(mask: Tensor, pattern: Pattern) -> Tensor:
    """Let a mask carry a pattern, and return it."""
    if pattern != UNSTRUCTURED:
        mask.pattern = pattern  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def pattern_for(text: str, shape: Sequence[int]) -> Pattern:
    """Return the pattern called `text` for a weight of this shape.

    >>> pattern_for("2:4", (10, 8)).capacity((10, 8))
    40

    Raises:
        ValueError: if there is no such pattern, or it does not fit the shape.
    """
    check_name(text)
    outputs, inputs = shape[0], math.prod(shape[1:])
    if text == "unstructured":
        return UNSTRUCTURED
    if text == "neuron":
        return Pattern(text, columns=inputs)
    if text.startswith("fan-in"):
        return Pattern(text, group=inputs, even=True, ablation=float(text.partition(":")[2] or 0))
    if text.startswith("block:"):
        rows, columns = map(int, text.removeprefix("block:").split("x"))
        if outputs % rows or inputs % columns:
            raise ValueError(f"{outputs} x {inputs} weights are not made of blocks of {rows} x {columns}")
        return Pattern(text, rows, columns)
    most, group = map(int, text.split(":"))
    if inputs % group:
        raise ValueError(f"its {inputs} inputs are no multiple of {group}")
    return Pattern(text, group=group, most=most)


def patterns_for(text: str | None, shapes: dict[str, Sequence[int]]) -> dict[str, Pattern]:
    """Return name -> the pattern called `text` for the weight of that name.

    Raises:
        ValueError: if there is no such pattern, or it does not fit a weight; names each.
    """
    patterns, unfit = {}, []
    for name, shape in shapes.items():
        try:
            patterns[name] = pattern_for("unstructured" if text is None else text, shape)
        except UnknownPattern:
            raise
        except ValueError as error:
            unfit.append(f"{name} {tuple(shape)}, for {error}")
    if unfit:
        raise ValueError(
            f"The pattern {text!r} does not fit {'; '.join(unfit)}. Keep these layers dense by dense=[...], or choose "
            "another pattern."
        )
    return patterns


class UnknownPattern(ValueError):
    """A pattern of no known kind."""


def check_name(text: str) -> str:
    """Return the name of a pattern, if it is one.

    Raises:
        UnknownPattern: if it is none.
    """
    n_of_m = re.fullmatch(r"(\d+):(\d+)", text)
    known = (
        text in ("unstructured", "neuron", "fan-in")
        or (n_of_m and 0 < int(n_of_m[1]) <= int(n_of_m[2]))
        or re.fullmatch(r"block:[1-9]\d*x[1-9]\d*", text)
        or re.fullmatch(r"fan-in:0\.\d+", text)
    )
    if not known:
        raise UnknownPattern(
            f"Unknown pattern {text!r}. Choose unstructured, N:M such as 2:4, block:RxC such as block:16x16, fan-in, "
            "fan-in:G with G the fraction of salient weights in [0, 1) such as fan-in:0.3, or neuron."
        )
    return text


def of_fan_in(pattern: Pattern, shape: Sequence[int], count: int) -> Pattern:
    """Return the pattern with its fan-in, where it is one of constant fan-in and the layer has `count` weights."""
    return replace(pattern, most=math.ceil(count / shape[0])) if pattern.even else pattern


def ablate(pattern: Pattern, mask: Tensor, wanted: Tensor) -> Tensor:
    """Return the mask without the neurons that too few salient weights enter.

    `wanted` marks the weights that unstructured growth would add. As many neurons stay as the layer's weights need.
    """
    assert pattern.most is not None
    rows = mask.flatten(1)
    salient = (rows | wanted.flatten(1)).sum(1) * _in_use(rows)
    needed = math.ceil(pattern.most * len(rows) / rows.shape[1])
    least = salient.sort(descending=True).values[needed - 1].clamp(max=max(1, pattern.ablation * pattern.most))
    return mask & (salient >= least).view(-1, *[1] * (mask.dim() - 1))


def _in_use(rows: Tensor) -> Tensor:
    """Return which neurons have a weight; all, if none has."""
    used = rows.any(1)
    return used | ~used.any()
