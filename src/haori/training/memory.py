"""Memory of this process, now and at its peak.

Peak memory is measured where it counts: on the GPU if training runs there, else resident on the host.
"""

import resource
import sys
from pathlib import Path

__all__ = ["current_memory_bytes", "peak_memory_bytes", "size_in_words"]


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the highest memory use so far, in bytes: CUDA's allocator for `cuda`, else maximum resident set size."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    # `ru_maxrss` of a child begins at the peak of the parent that started it; VmHWM does not.
    own = _own_status("VmHWM")
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory_bytes(device: str = "cpu") -> int:
    """Return the memory in use now, in bytes: CUDA's allocator for `cuda`, else resident set size; 0 if unknown."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated())
    return _own_status("VmRSS") or 0


def _own_status(field: str) -> int | None:
    """Return a size from Linux's status of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def size_in_words(size_bytes: int) -> str:
    """Write a size for people: `1.24 GB`, or `78.8 kB` for small ones."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size_bytes >= 0.1 * u), (1e3, "kB"))
    return f"{size_bytes / unit:.2f} {name}" if unit == 1e9 else f"{size_bytes / unit:.1f} {name}"
