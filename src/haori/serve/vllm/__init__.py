"""Text answered by vLLM servers: the names, keys, limits and errors of this project stay in front of them.

Importing this package is light; each name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.serve.vllm.engine import VllmEngine
    from haori.serve.vllm.opening import VllmChoice, open_vllm

__all__ = ["VllmChoice", "VllmEngine", "open_vllm"]

__getattr__ = lazy_exports(
    __name__,
    {
        "engine": ("VllmEngine",),
        "opening": ("VllmChoice", "open_vllm"),
    },
)
