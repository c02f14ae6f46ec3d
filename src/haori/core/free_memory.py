"""Gives freed memory back to the system: the C library keeps for itself what it may need again."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

__all__ = ["release_free_memory"]


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    Batches of ever new shapes leave its heap full of holes; without this, resident memory of a CPU run grows by
    half over a few dozen steps (docs/log.md). Other threads can go on meanwhile, but may wait for its locks.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
