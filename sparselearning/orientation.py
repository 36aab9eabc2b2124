"""Which dimensions of a weight are its outputs and which its inputs.

A linear layer's weight is (outputs, inputs), a convolution's (outputs, inputs, height, width). Some layers store them
otherwise: a transposed convolution (inputs, outputs, ...), transformers' Conv1D (inputs, outputs), experts (experts,
outputs, inputs). Patterns, initial scales and distributions ask here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """The order of dimensions: `copies` layers of one shape, each (outputs, inputs, ...) or (inputs, outputs, ...).

    copies: experts, or the groups of a transposed convolution, whose inputs are divided among them.
    stacked: whether the copies are a dimension of their own, the first.
    inputs_first: whether the inputs come before the outputs.
    """

    copies: int = 1
    stacked: bool = False
    inputs_first: bool = False

    def layer(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (outputs, inputs, ...) of one copy.

        >>> Orientation(inputs_first=True).layer((3, 8, 5, 5)), Orientation(4, stacked=True).layer((4, 6, 2))
        ((8, 3, 5, 5), (6, 2))
        """
        first, second, *rest = shape[1:] if self.stacked else (shape[0] // self.copies, *shape[1:])
        return (second, first, *rest) if self.inputs_first else (first, second, *rest)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Return the tensor as a matrix with a row for each output of each copy; a view where memory allows one."""
        if self == PLAIN:
            return tensor.flatten(1)
        outputs, *inputs = self.layer(tensor.shape)
        return self._apart(tensor).reshape(self.copies * outputs, math.prod(inputs))

    def tensor(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a matrix of this kind as a tensor of this shape: the inverse of `matrix`."""
        if self == PLAIN:
            return matrix.view(shape)
        apart = matrix.reshape(self.copies, *self.layer(shape))
        return (apart.transpose(1, 2) if self.inputs_first else apart).reshape(shape)

    def _apart(self, tensor):
        """Return the tensor as (copies, outputs, inputs, ...)."""
        apart = tensor if self.stacked else tensor.reshape(self.copies, -1, *tensor.shape[1:])
        return apart.transpose(1, 2) if self.inputs_first else apart


PLAIN = Orientation()
