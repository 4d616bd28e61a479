"""Bounds on what the C library's allocator keeps of freed memory, for servers that run for months."""

import ctypes

__all__ = ["bound_heap"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
ARENAS, TRIM_BYTES, MAPPED_BYTES = 4, 4 << 20, 1 << 20


def bound_heap() -> bool:
    """Have freed memory returned to the system; call it before there are threads. False where there is no glibc.

    By itself glibc gives every thread a heap, up to eight for each core, and keeps in each up to 64 MiB of what was
    freed once large blocks have come and gone, such as an answer of 20,000 rows: a server's memory wanders by hundreds
    of megabytes and never tells a leak from a habit.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    bounds = {_M_ARENA_MAX: ARENAS, _M_TRIM_THRESHOLD: TRIM_BYTES, _M_MMAP_THRESHOLD: MAPPED_BYTES}
    return all([mallopt(which, value) for which, value in bounds.items()])
