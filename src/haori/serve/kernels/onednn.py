"""Limits oneDNN's caches of matrix products.

oneDNN keeps generated code for every exact shape, and torch's binding to it keeps more, 1,024 shapes each and half a
megabyte together. A batch has another number of rows at every other step, so a server would go on growing for thousands
of requests, by 300 MB and more. A shape that was forgotten costs half a millisecond.
"""

import os

__all__ = ["remember_few_shapes"]

_SHAPES = "128"  # five of a Llama-like model for each number of rows
_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def remember_few_shapes() -> None:
    """Lower the limits, before the first product reads them. One that is set already stays."""
    for name in _LIMITS:
        os.environ.setdefault(name, _SHAPES)
