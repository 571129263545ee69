"""How the C library gives memory back, which decides what a large tensor on a CPU costs."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> str | None:
    """Keep what tensors free for the next ones, in this whole process; returns the reason where that cannot be had.

    glibc hands large blocks back to the system and asks for them again, and every page of a fresh one is a fault: for
    most kernels more time than their work. The process then stays as large as it ever was. It is for programs to call
    at their start; the library never does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no library without a name
        return "the C library has no mallopt"
    # No block of its own for large requests, and the end of the heap is never given back.
    kept = mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)
    return None if kept else "the C library refused"
