"""Tells an exhausted memory from other failures, whichever library found it first.

torch raises OutOfMemoryError on a GPU and a plain RuntimeError on a CPU, C++ code `std::bad_alloc`, safetensors an
OSError, Python MemoryError: only their texts have something in common.
"""

import re

__all__ = ["is_out_of_memory", "requested_bytes"]

_TEXTS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|unable to mmap|bad_alloc"
    r"|could not create a memory object|std::bad_array_new_length",
    re.IGNORECASE,
)
_REQUEST = re.compile(r"tried to allocate ([\d.]+)\s*(bytes|[KMGT]i?B)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory could not be had."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and _TEXTS.search(str(error)) is not None


def requested_bytes(error: BaseException) -> int | None:
    """Return how much was asked for in vain, where the message says so."""
    found = _REQUEST.search(str(error))
    if found is None:
        return None
    return int(float(found[1]) * _UNITS[found[2][0].lower()])
