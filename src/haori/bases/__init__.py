"""Base models: find or obtain one, identify it by content, load it, name its linear modules, generate with it.

Importing this package imports neither torch nor transformers; names are resolved when they are first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.bases.architectures import continues_text, writes_text
    from haori.bases.base import Base, BaseEntry, Component
    from haori.bases.catalogue import CATALOGUE, CatalogueEntry
    from haori.bases.dtype import DtypeChoice, choose_dtype, default_device, torch_dtype
    from haori.bases.find import add_base, find_base, list_bases, remove_base, show_base
    from haori.bases.fingerprint import fingerprint_folder
    from haori.bases.generation import end_tokens, generate, stop_tokens, stream
    from haori.bases.heads import fresh_modules, head_modules, own_head
    from haori.bases.loading import load_model, load_skeleton, weight_bytes
    from haori.bases.targets import linear_modules, resolve_targets
    from haori.bases.tokenizer import embeddings_of, load_tokenizer

__all__ = [
    "CATALOGUE",
    "Base",
    "BaseEntry",
    "CatalogueEntry",
    "Component",
    "DtypeChoice",
    "add_base",
    "choose_dtype",
    "continues_text",
    "default_device",
    "embeddings_of",
    "end_tokens",
    "find_base",
    "fingerprint_folder",
    "fresh_modules",
    "generate",
    "head_modules",
    "linear_modules",
    "list_bases",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "own_head",
    "remove_base",
    "resolve_targets",
    "show_base",
    "stop_tokens",
    "stream",
    "torch_dtype",
    "weight_bytes",
    "writes_text",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "architectures": ("continues_text", "writes_text"),
        "base": ("Base", "BaseEntry", "Component"),
        "catalogue": ("CATALOGUE", "CatalogueEntry"),
        "dtype": ("DtypeChoice", "choose_dtype", "default_device", "torch_dtype"),
        "find": ("add_base", "find_base", "list_bases", "remove_base", "show_base"),
        "fingerprint": ("fingerprint_folder",),
        "generation": ("end_tokens", "generate", "stop_tokens", "stream"),
        "heads": ("fresh_modules", "head_modules", "own_head"),
        "loading": ("load_model", "load_skeleton", "weight_bytes"),
        "targets": ("linear_modules", "resolve_targets"),
        "tokenizer": ("embeddings_of", "load_tokenizer"),
    },
)
