"""The new words of an adapter of pictures: what they are called and where their vectors stand in its weight file.

The vectors are tensors of the weight file, one for each text encoder; `words.json` beside it says whose they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from haori.core.errors import FileFormatError
from haori.core.new_words import BUNDLED, NewWords
from haori.core.safetensors_header import TensorEntry

__all__ = ["WORDS_NAME", "read_words", "word_encoder", "write_words"]

WORDS_NAME = "words.json"
_LIMIT_BYTES = 1 << 20
_PREFIX = "base_model.model."
_ROWS = ".token_embedding.words.weight"


def write_words(folder: Path, words: NewWords) -> None:
    """Write the words beside the weights in `folder`."""
    (folder / WORDS_NAME).write_text(words.model_dump_json(indent=2) + "\n", encoding="utf-8")


def word_encoder(key: str) -> str | None:
    """Return the text encoder whose rows of new words a tensor of a PEFT folder is; None for any other tensor."""
    name = key.removeprefix(_PREFIX)
    encoder = name.partition(".")[0]
    return encoder if name != key and name.endswith(_ROWS) and encoder in BUNDLED else None


def read_words(folder: Path, tensors: Mapping[str, TensorEntry]) -> NewWords | None:
    """Return the new words of the adapter in `folder`; None if it has none.

    Args:
        folder: A PEFT folder.
        tensors: The tensors of its weight file.

    Raises:
        FileFormatError: words.json is missing or damaged, or is about other vectors than the weights.
    """
    rows = {encoder: entry.shape for key, entry in tensors.items() if (encoder := word_encoder(key)) is not None}
    path = folder / WORDS_NAME
    if not path.is_file():
        if rows:
            raise FileFormatError(
                f"The adapter in {str(folder)!r} holds vectors of new words, and the {WORDS_NAME} that names them is "
                "missing; copy the whole folder again."
            )
        return None
    if path.stat().st_size > _LIMIT_BYTES:
        raise FileFormatError(f"{str(path)!r} is larger than {_LIMIT_BYTES:,} bytes, which no list of words is.")
    try:
        words = NewWords.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError, RecursionError):
        raise FileFormatError(
            f'{str(path)!r} is not what describes new words; expected {{"words": [...], "first": ..., "begins": ...}}.'
        ) from None
    told = {encoder: len(begins) for encoder, begins in words.begins.items()}
    held = {encoder: shape[0] if len(shape) == 2 else 0 for encoder, shape in rows.items()}
    if told != held or words.first.keys() != held.keys() or any(count != words.vectors for count in held.values()):
        raise FileFormatError(
            f"{str(path)!r} describes {words.vectors} vectors for {', '.join(sorted(told)) or 'no text encoder'}, and "
            f"the weights beside it hold {', '.join(f'{n} for {name}' for name, n in sorted(held.items())) or 'none'}."
        )
    return words
