"""Run sparse networks sparsely: layers whose time follows their active weights."""

from sparselearning.sparse.library import available
from sparselearning.sparse.modules import SparseConv2d, SparseLinear

__all__ = ["SparseConv2d", "SparseLinear", "available"]
