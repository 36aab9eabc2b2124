"""The memory that a process keeps for its next step."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST = 2**31 - 1  # that mallopt takes


def keep_freed_memory(number_of_bytes: int = MOST) -> bool:
    """Keep up to this much freed memory for what is allocated next; return whether the C library can.

    glibc returns large blocks to the system when they are freed. A training on a CPU frees its activations in every
    step, and has the system map and clear the same pages for the next: a fifth of a step of LeNet-5 (docs/sparse.md).
    Results do not change, nor does the most memory that is in use. The setting is the whole process's, so it is a
    program's to make, not a library's: the scripts do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Blocks below the first limit are of the heap, which is cut beyond the second. Older versions take 32 MB at most.
    from_heap = mallopt(MMAP_THRESHOLD, number_of_bytes) or mallopt(MMAP_THRESHOLD, 32 << 20)
    return bool(from_heap and mallopt(TRIM_THRESHOLD, number_of_bytes))
