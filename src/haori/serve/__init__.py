"""The text engine: many adapters over one base in one batch. Knows nothing about HTTP.

Importing this package is light; each name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.serve.adapters.directory import AdapterDirectory
    from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
    from haori.serve.embedding.layout import is_encoder
    from haori.serve.embedding.opening import open_embedder
    from haori.serve.engine.engine import TextEngine
    from haori.serve.engine.scheduler import EngineLimits
    from haori.serve.opening import open_engine
    from haori.serve.request import BASE, AdapterMix, Sampling, StreamChunk, TextRequest, TokenLogprob
    from haori.serve.status import EngineStatus

__all__ = [
    "BASE",
    "AdapterDirectory",
    "AdapterMix",
    "EmbedderLimits",
    "EngineLimits",
    "EngineStatus",
    "Sampling",
    "StreamChunk",
    "TextEmbedder",
    "TextEngine",
    "TextRequest",
    "TokenLogprob",
    "is_encoder",
    "open_embedder",
    "open_engine",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "adapters.directory": ("AdapterDirectory",),
        "embedding.embedder": ("EmbedderLimits", "TextEmbedder"),
        "embedding.layout": ("is_encoder",),
        "embedding.opening": ("open_embedder",),
        "engine.engine": ("TextEngine",),
        "engine.scheduler": ("EngineLimits",),
        "opening": ("open_engine",),
        "request": ("BASE", "AdapterMix", "StreamChunk", "Sampling", "TextRequest", "TokenLogprob"),
        "status": ("EngineStatus",),
    },
)
