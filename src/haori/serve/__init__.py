"""The text engine: many adapters over one base in one batch. Knows nothing about HTTP.

Importing this package is light; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.serve.directory import AdapterDirectory
    from haori.serve.embedder import EmbedderLimits, TextEmbedder
    from haori.serve.embedder_opening import open_embedder
    from haori.serve.embedding_layout import is_encoder
    from haori.serve.engine import EngineStatus, TextEngine
    from haori.serve.opening import open_engine
    from haori.serve.request import BASE, AdapterMix, Delta, Sampling, TextRequest, TokenLogprob
    from haori.serve.scheduler import EngineLimits

_HOMES = {
    "directory": ("AdapterDirectory",),
    "embedder": ("EmbedderLimits", "TextEmbedder"),
    "embedder_opening": ("open_embedder",),
    "embedding_layout": ("is_encoder",),
    "engine": ("EngineStatus", "TextEngine"),
    "opening": ("open_engine",),
    "request": ("BASE", "AdapterMix", "Delta", "Sampling", "TextRequest", "TokenLogprob"),
    "scheduler": ("EngineLimits",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BASE",
    "AdapterDirectory",
    "AdapterMix",
    "Delta",
    "EmbedderLimits",
    "EngineLimits",
    "EngineStatus",
    "Sampling",
    "TextEmbedder",
    "TextEngine",
    "TextRequest",
    "TokenLogprob",
    "is_encoder",
    "open_embedder",
    "open_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
