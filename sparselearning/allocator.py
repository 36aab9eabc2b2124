"""The memory that a process keeps for its next step."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST = 2**31 - 1  # that mallopt takes
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory(number_of_bytes: int = MOST) -> bool:
    """Keep up to this much freed memory for what is allocated next; return whether the C library will.

    glibc returns large blocks to the system when they are freed. A training on a CPU frees its activations in every
    step, and has the system map and clear the same pages for the next: a fifth of a step of LeNet-5 (docs/sparse.md).
    Results do not change, nor does the most memory that is in use. The setting is the whole process's. The scripts make
    it, and the first sparse layer that runs, for it would wait longer for its pages than it computes. Where the
    environment sets any of CHOICES, or malloc in GLIBC_TUNABLES, that stays.
    """
    if any(name in os.environ for name in CHOICES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Blocks below the first limit are of the heap, which is cut beyond the second. Older versions take 32 MB at most.
    from_heap = mallopt(MMAP_THRESHOLD, number_of_bytes) or mallopt(MMAP_THRESHOLD, 32 << 20)
    return bool(from_heap and mallopt(TRIM_THRESHOLD, number_of_bytes))
