"""Opens an encoder: loads it, reads how it pools and what its classifiers are like, and starts the embedder."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from haori.core.errors import BaseError, InputError
from haori.core.records import Head
from haori.serve.adapters.reading import AdapterWeights, read_adapter_weights
from haori.serve.adapters.tiers import PinnedAdapters
from haori.serve.embedding.classifier_weights import ClassifierReader
from haori.serve.embedding.embedder import EmbedderLimits, TextEmbedder
from haori.serve.embedding.heads import AdapterHeads
from haori.serve.embedding.layout import read_embedding_layout
from haori.serve.kernels.onednn import remember_few_shapes
from haori.serve.kernels.openmp import let_workers_go
from haori.serve.models.base_files import BaseFiles
from haori.serve.models.classifier_form import PROBE_LABELS, ClassifierForm
from haori.serve.models.encoder import AdaptedEncoder

if TYPE_CHECKING:
    from torch import nn

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
        pinned: Adapters that are never evicted.

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

    reader, heads = _open_classifiers(base, encoder, model, files_of)

    let_workers_go()  # this thread has loaded the model; the embedder's own computes

    def read(files: "AdapterFiles", adapter: str) -> AdapterWeights:
        if files.head is None:
            return read_adapter_weights(files, encoder.bank, adapter=adapter, dtype=encoder.dtype)
        heads.check_served(adapter, files.head)
        assert reader is not None
        return reader.read(files, files.head, adapter=adapter, dtype=encoder.dtype)

    def prepare(text: str) -> str:  # as sentence-transformers does
        return text.strip().lower() if layout.lower_case else text.strip()

    most = min(limits.longest, base.context_length - encoder.kept_positions, tokenizer.model_max_length)
    limits = replace(limits, longest=min(most, layout.longest or most), longest_classified=most)
    return TextEmbedder(
        base, tokenizer, encoder, read, files_of, heads, limits=limits, prepare_text=prepare, pinned=pinned
    )


def _open_classifiers(
    base: "Base", encoder: AdaptedEncoder, model: "nn.Module", files_of: "Callable[[str], AdapterFiles]"
) -> tuple[ClassifierReader | None, AdapterHeads]:
    """Find out what follows the encoder in a classifier, and whether the base is one."""
    from haori.bases import load_skeleton, own_head

    labels = tuple(str(number) for number in range(PROBE_LABELS))
    try:
        skeleton = load_skeleton(base, head=Head(kind="sequence_classification", labels=labels))
        form = ClassifierForm(skeleton, model, encoder.probe, name=base.name)
    except BaseError as error:
        return None, AdapterHeads(files_of, None, name=base.name, unserved=str(error))
    files = BaseFiles(base.path, {})
    wanted = [(name, name) for name in form.shapes(PROBE_LABELS)]
    wanted += [(name, stored) for name in form.poolers for stored in (name, str(form.inner(name)))]
    stored = {name: files.tensor(key).clone() for name, key in wanted if key in files.names}
    reader = ClassifierReader(form, encoder.bank, stored, name=base.name)
    own = own_head(base)
    weights = reader.own_head(own) if own is not None and own.kind == "sequence_classification" else {}
    encoder.classify_by(form, weights)
    return reader, AdapterHeads(files_of, own if weights else None, name=base.name)
