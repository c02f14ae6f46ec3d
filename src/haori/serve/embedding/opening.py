"""Opens an encoder for embeddings: loads it, looks how it pools, and starts the embedder over it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.serve.adapters.tiers import PinnedAdapters
from haori.serve.adapters.weights import AdapterWeights, read_adapter_weights
from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
from haori.serve.embedding.layout import read_embedding_layout
from haori.serve.kernels.onednn import remember_few_shapes
from haori.serve.kernels.openmp import let_workers_go
from haori.serve.models.encoder import AdaptedEncoder

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library import AdapterFiles

__all__ = ["open_embedder"]

# Encoders are small, and nearness of vectors is decided in digits that 16 bits do not have.
_DTYPES = {"auto": "fp32", "fp32": "fp32", "bf16": "bf16"}


def open_embedder(
    base: "Base",
    files_of: "Callable[[str], AdapterFiles]",
    limits: EmbedderLimits,
    *,
    weights: str = "auto",
    pinned: PinnedAdapters = tuple,
) -> TextEmbedder:
    """Load a base and start an embedder over it.

    Args:
        base: The base.
        files_of: Finds an adapter's files by its content id.
        limits: What the embedder takes on; the longest text is lowered to the base's.
        weights: `auto` (fp32), `fp32` or `bf16`.
        pinned: Adapters that are never put out of memory.

    Raises:
        BaseError: The base cannot be loaded, is no encoder, or makes vectors in a way that is not known.
        InputError: The format is unknown.
    """
    from haori.bases import load_model, load_tokenizer

    if weights not in _DTYPES:
        raise InputError(f"Weights of an encoder cannot be {weights!r}; choose {', '.join(_DTYPES)}.")
    remember_few_shapes()
    layout = read_embedding_layout(base.path, name=base.name)
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=_DTYPES[weights], device="cpu")
    pad = next((token for token in (model.config.pad_token_id, tokenizer.pad_token_id) if token is not None), 0)
    encoder = AdaptedEncoder(model, layout, pad=pad, name=base.name)

    let_workers_go()  # this thread has loaded the model; the embedder's own computes

    def read(adapter: str) -> AdapterWeights:
        return read_adapter_weights(files_of(adapter), encoder.bank, adapter=adapter, dtype=encoder.dtype)

    def prepare(text: str) -> str:  # as sentence-transformers does
        return text.strip().lower() if layout.lower_case else text.strip()

    known = [limits.longest, base.context_length, tokenizer.model_max_length, layout.longest or limits.longest]
    return TextEmbedder(
        base, tokenizer, encoder, read,
        limits=replace(limits, longest=min(known)), prepare_text=prepare, pinned=pinned,
    )  # fmt: skip
