"""Memory of this process: its peak, and giving back what the C library keeps for itself.

Peak memory is measured where it counts: on the GPU if training runs there, else resident on the host.
"""

import ctypes
import resource
import sys
from collections.abc import Callable
from functools import cache

__all__ = ["peak_memory_bytes", "release_free_memory"]


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the highest memory use so far, in bytes: CUDA's allocator for `cuda`, else maximum resident set size."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    Batches of ever new shapes leave its heap full of holes; without this, resident memory of a CPU run grows by
    half over a few dozen steps (docs/log.md).
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
