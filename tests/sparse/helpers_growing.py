"""Masks as layers hold them that have nothing of their dense size."""

from sparselearning.sparse.growing import indices_at


def indices_of(mask):
    """Return the active entries of a mask as `start` and `column`."""
    return indices_at(mask.flatten().nonzero().flatten(), *mask.shape)
