"""Peak memory of this process, where it counts: on the GPU if training runs there, else resident on the host."""

import resource
import sys

__all__ = ["peak_memory_bytes"]


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the highest memory use so far, in bytes: CUDA's allocator for `cuda`, else maximum resident set size."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
