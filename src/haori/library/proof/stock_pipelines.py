"""What a stock pipeline of diffusers makes of an adapter's file, compared with what the adapter does.

Both run on the same copy of the base, in float64: first with the adapter's changes of each weight, then with the layers
that `load_lora_weights` puts in, and with the vectors of new words that `load_textual_inversion` does.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import VerificationError
from haori.core.new_words import BUNDLED, NewWord
from haori.library.adapter_components import needed_components
from haori.library.formats.bundled_words import embedding_files, word_vectors
from haori.library.formats.format import open_source
from haori.library.proof.exact import exact_logits
from haori.library.proof.logits import compare_logits, model_dtype
from haori.library.proof.noise import NOISE, live_changes, noise_probes

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base
    from haori.core.new_words import NewWords
    from haori.library.updates import AdapterUpdates

__all__ = ["prove_in_pipeline"]

# As a share of the adapter's effect: factors are rounded to the dtype they had when they are scaled anew, and to the
# base's by the pipeline that loads them.
_SHARE, _SHARE_SIXTEEN_BIT = 1e-4, 2e-2
_FLOOR = 1e-12
_LARGE = 4e9  # weights that are loaded in 16 bits
_ANY = "a"  # what the vectors begin as is of no account: an adapter's take their place
_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError, AssertionError)


def prove_in_pipeline(base: "Base", updates: "AdapterUpdates", file: Path) -> None:
    """Refuse a file of which the base's stock pipeline makes something else than the adapter.

    Args:
        base: A pipeline of a family that can be run here.
        updates: The adapter.
        file: What was written of it for diffusers; the files of its new words lie beside it.

    Raises:
        VerificationError: The pipeline cannot load the file, or predicts otherwise with it.
    """
    from haori.bases import load_model
    from haori.bases.diffusion import pipeline_of, put_words
    from haori.bases.quiet import quiet_diffusers

    vectors = word_vectors(updates.extra)
    words = _placed(base, vectors)
    changed = (*updates.components, *(() if words is None else words.first))
    probes = noise_probes(base, changed, words)
    needed = needed_components(base, changed) or ()
    is_small = sum(base.components[name].parameters for name in needed) < _LARGE
    model: Any = load_model(base, components=needed, dtype="fp32" if is_small else "auto")
    plain = {name: encoder.get_input_embeddings() for name, encoder in model.text_encoders.items()}
    if words is not None:
        put_words(model, words)
    of_base = exact_logits(model, probes)
    if words is not None:
        _fill(model, words, vectors)
    of_adapter = exact_logits(model, probes, live_changes(base, updates))
    for name, embedding in plain.items():  # which the pipeline gives rows itself
        model.text_encoders[name].set_input_embeddings(embedding)
    live: dict[str, Any] = {**dict.fromkeys(base.components), **dict(model.named_children())}
    pipe: Any = pipeline_of(base, live)
    try:
        with warnings.catch_warnings(), quiet_diffusers():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
            _load_words(pipe, file)
    except _ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise VerificationError(
            f"The adapter was not exported: the stock {base.pipeline} cannot load what was written: {reason}"
        ) from error
    of_file = exact_logits(model, probes)
    effect, moved = compare_logits(of_adapter, of_base).rms, compare_logits(of_adapter, of_file).rms
    is_exact = model_dtype(model) == "fp32" and not _is_narrow(updates)
    limit = (_SHARE if is_exact else _SHARE_SIXTEEN_BIT) * effect + _FLOOR
    if not moved <= limit:
        raise VerificationError(
            f"The adapter was not exported: with what was written the {NOISE} of the stock {base.pipeline} differ by "
            f"{moved:.2g} of their spread from those of the adapter (limit {limit:.2g}), which moves them by "
            f"{effect:.2g}."
        )


def _load_words(pipe: Any, file: Path) -> None:
    """Give a pipeline the new words that belong to a LoRA's file, as `docs/guide/pictures.md` shows it."""
    from safetensors.torch import load_file

    parts = {BUNDLED[name]: name for name in BUNDLED}
    for word, path in embedding_files(open_source(file)).items():
        for key, rows in load_file(path).items():
            name = parts.get(key, "text_encoder")
            pipe.load_textual_inversion(
                rows, token=word, text_encoder=getattr(pipe, name),
                tokenizer=getattr(pipe, name.replace("text_encoder", "tokenizer")),
            )  # fmt: skip


def _placed(base: "Base", vectors: "Mapping[str, Mapping[str, Tensor]]") -> "NewWords | None":
    """Return the places that new words get in the vocabulary of a base."""
    from haori.bases.diffusion import PipelineProcessor

    words = [NewWord(word=word, vectors=len(next(iter(rows.values()))), start=_ANY) for word, rows in vectors.items()]
    return PipelineProcessor(base, words).words


def _fill(model: Any, words: "NewWords", vectors: "Mapping[str, Mapping[str, Tensor]]") -> None:
    """Give the rows of new words in a model the vectors of an adapter."""
    for encoder, found in model.text_encoders.items():
        rows = found.get_input_embeddings().words.weight
        for word, place in words.rows().items():
            if encoder in vectors[word]:
                rows.data[place] = vectors[word][encoder].to(rows)


def _is_narrow(updates: "AdapterUpdates") -> bool:
    factors = [factor for update in updates.modules.values() for factor in update.factors.values()]
    return any(factor.element_size() < 4 for factor in factors)
