"""Text answered by vLLM servers: the names, keys, limits and errors of this project stay in front of them.

Importing this package is light; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.serve.vllm.engine import VllmEngine
    from haori.serve.vllm.opening import VllmChoice, open_vllm

_HOMES = {"engine": ("VllmEngine",), "opening": ("VllmChoice", "open_vllm")}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["VllmChoice", "VllmEngine", "open_vllm"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
