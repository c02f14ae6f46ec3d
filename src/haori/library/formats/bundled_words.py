"""Vectors of new words in the neutral form, and in files: bundled in a LoRA's own file, or in one of their own.

`bundle_emb.WORD.clip_l` and `.clip_g` [V, D] are what AUTOMATIC1111 (which splits the key at the first points) and
OneTrainer read; `.string_to_param.*` is what the former writes for Stable Diffusion 1. Pipelines of diffusers read a
file for each word: of one text encoder with the word as its key, of two with `clip_l` and `clip_g`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, InputError
from haori.core.new_words import BUNDLED, NewWords, bundled_key
from haori.core.safetensors_header import read_safetensors_header
from haori.library.formats.safetensors_writing import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library.formats.format import Source

__all__ = [
    "EMBEDDINGS",
    "PREFIX",
    "embedding_files",
    "encoder_of",
    "is_bundled",
    "named_rows",
    "read_embeddings",
    "refuse_words",
    "word_names",
    "word_vectors",
    "write_embeddings",
]

PREFIX = "bundle_emb."
EMBEDDINGS = "textual_inversion"
"""Under which the header of a LoRA's file names the files of its new words: a table of words and file names."""

_ENCODERS = {**{name: encoder for encoder, name in BUNDLED.items()}, "string_to_param.*": "text_encoder"}
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def is_bundled(key: str) -> bool:
    """Say whether a key is that of a new word's vectors."""
    return key.startswith(PREFIX)


def named_rows(words: NewWords, encoder: str, rows: "Tensor") -> "dict[str, Tensor]":
    """Return the vectors [V, D] of all words for a text encoder under the key of each word."""
    return {bundled_key(word, encoder): rows[place].contiguous() for word, place in words.rows().items()}


def word_names(extra: "Mapping[str, Tensor]") -> list[str]:
    """Return the new words that an adapter brings, whatever its vectors are for."""
    return sorted({key.removeprefix(PREFIX).partition(".")[0] for key in extra if is_bundled(key)})


def encoder_of(key: str) -> str | None:
    """Return the text encoder whose input a key's vectors are; None for what only other programs know."""
    return _ENCODERS.get(key.removeprefix(PREFIX).partition(".")[2])


def word_vectors(extra: "Mapping[str, Tensor]") -> "dict[str, dict[str, Tensor]]":
    """Return the vectors [V, D] of each new word by text encoder.

    Args:
        extra: What an adapter holds beside its modules; other keys than those of new words are passed over.

    Raises:
        InputError: There are vectors for something else than the input of a text encoder, or of different numbers.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in extra.items():
        if not is_bundled(key):
            continue
        word, _, kind = key.removeprefix(PREFIX).partition(".")
        if kind not in _ENCODERS or tensor.dim() not in (1, 2):
            raise InputError(
                f"What {key[:120]!r} of shape {list(tensor.shape)} does for the new word {word!r} is not known here; "
                f"known are {', '.join(_ENCODERS)}, with a vector in each row."
            )
        found.setdefault(word, {})[_ENCODERS[kind]] = tensor.reshape(-1, tensor.shape[-1])
    for word, vectors in found.items():
        if len({len(rows) for rows in vectors.values()}) > 1:
            raise InputError(f"The new word {word!r} has another number of vectors for each text encoder.")
    return found


def refuse_words(extra: "Mapping[str, Tensor]", title: str) -> None:
    """Refuse to write new words in a format that has no place for them.

    Raises:
        InputError: There are some.
    """
    if words := word_names(extra):
        raise InputError(
            f"{title} has no place for the vectors of the new words {', '.join(words)}; write the adapter as kohya, "
            "which bundles them, or as diffusers, which writes a file for each beside it."
        )


def write_embeddings(path: Path, extra: "Mapping[str, Tensor]") -> dict[str, str]:
    """Write a file for each new word beside the LoRA's file, and return what the LoRA's header says of them.

    Args:
        path: The LoRA's file; the others are called after it and the word.
        extra: With the vectors.

    Raises:
        InputError: A word has vectors that pipelines of diffusers do not read.
    """
    names: dict[str, str] = {}
    for word, vectors in word_vectors(extra).items():
        name = f"{path.stem}_{_UNSAFE.sub('', word) or 'word'}.safetensors"
        if name in names.values():
            name = f"{path.stem}_word{len(names) + 1}.safetensors"
        alone = len(vectors) == 1 and "text_encoder" in vectors
        tensors = {word if alone else BUNDLED[encoder]: rows for encoder, rows in vectors.items()}
        write_tensors(path.with_name(name), tensors, {"format": "pt", "token": word})
        names[word] = name
    return {EMBEDDINGS: json.dumps(names)} if names else {}  # in order: so they are given their ids


def embedding_files(source: "Source") -> dict[str, Path]:
    """Return the files of the new words that a LoRA's header names, by word.

    Raises:
        FileFormatError: The header is damaged, or a file is missing.
    """
    if EMBEDDINGS not in source.metadata:
        return {}
    try:
        names: Any = json.loads(source.metadata[EMBEDDINGS])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(_is_plain(name) for name in names.values()):
        raise FileFormatError(f"{str(source.path)!r} cannot be read: its {EMBEDDINGS} is no table of file names.")
    found = {word: source.path.with_name(name) for word, name in names.items()}
    for word, path in found.items():
        if not path.is_file():
            raise FileFormatError(
                f"{str(source.path)!r} comes with the new word {word!r} in {path.name!r}, which is not beside it; "
                "keep the files together."
            )
    return found


def read_embeddings(source: "Source") -> "dict[str, Tensor]":
    """Return the vectors of the new words that a LoRA's header names, under the keys of the neutral form.

    Raises:
        FileFormatError: A file is missing or holds something else.
    """
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for word, path in embedding_files(source).items():
        read_safetensors_header(path)
        for key, tensor in load_file(path).items():
            encoder = "text_encoder" if key == word else _ENCODERS.get(key)
            if encoder is None:
                raise FileFormatError(f"{str(path)!r} holds {key[:120]!r}, which is no vector of the word {word!r}.")
            found[bundled_key(word, encoder)] = tensor
    return found


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
