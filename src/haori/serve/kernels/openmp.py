"""Keeps OpenMP's threads to the one thread that computes.

Each thread that runs a parallel region gets workers of its own and keeps them. As soon as there are more of them than
processors, libgomp lets all of them wait asleep instead of spinning, and a decoding step, which has hundreds of short
regions, takes twice as long. So a thread that has loaded a model ends its workers, and threads that only read files
have none.
"""

import ctypes
from functools import lru_cache

from haori.core.native_code import openmp_path

__all__ = ["compute_alone", "let_workers_go"]

_SOFT_PAUSE = 1


def let_workers_go() -> None:
    """End the workers of this thread; they come back with its next parallel region."""
    runtime = _runtime()
    if runtime is not None and hasattr(runtime, "omp_pause_resource_all"):
        runtime.omp_pause_resource_all(_SOFT_PAUSE)


def compute_alone() -> None:
    """Make this thread compute without workers from now on."""
    import torch

    runtime = _runtime()
    if runtime is not None:
        torch.get_num_threads()  # when first asked on a thread, torch sets the number anew
        runtime.omp_set_num_threads(1)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL | None:
    path = openmp_path()
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None
