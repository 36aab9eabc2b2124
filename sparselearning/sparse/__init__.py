"""Run sparse networks sparsely: layers whose time follows their active weights."""

from sparselearning.sparse.conversion import LayerReport, Report, convert
from sparselearning.sparse.library import available
from sparselearning.sparse.modules import SparseConv2d, SparseLinear

__all__ = ["LayerReport", "Report", "SparseConv2d", "SparseLinear", "available", "convert"]
