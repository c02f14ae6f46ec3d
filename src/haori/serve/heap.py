"""Lets the C library keep what a step frees for the next one, where it is glibc."""

import ctypes
import sys
from contextlib import suppress

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20  # glibc takes no more


def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MB that were freed, instead of giving them back and asking for them again.

    It gives back 128 kB at the end of a heap as soon as they are free, and new pages cost more than what is computed
    in them: reading an adapter takes half as long again.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
