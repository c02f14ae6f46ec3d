"""Loads the tokenizer of a base.

Which class of transformers reads a tokenizer is found out by its AutoTokenizer, which imports half of transformers for
it: two seconds. The answer is remembered, and the next time that class is asked directly.
"""

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

from haori.bases.base import Base
from haori.bases.quiet import quiet_transformers
from haori.bases.remembered import recall, remember
from haori.core.errors import BaseError
from haori.core.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["embeddings_of", "load_tokenizer"]

_TOPIC = "tokenizer"


class _TokenizerClass(Record):
    """Where the class lies that reads a base's tokenizer."""

    module: str
    name: str


def embeddings_of(base: Base) -> int | None:
    """Return the tokens that a base has embeddings for, by its configuration; None where that does not say."""
    try:
        config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    found = [part.get("vocab_size") for part in (config.get("text_config"), config) if isinstance(part, dict)]
    return next((rows for rows in found if isinstance(rows, int) and rows > 0), None)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of `base`; where it has no padding token, or one without embedding, its end token pads.

    The vocabulary is never changed.

    Raises:
        BaseError: There is no tokenizer, or it cannot be read.
    """
    if base.fingerprint.tokenizer is None:
        raise BaseError(
            f"The base {base.name!r} has no tokenizer in {str(base.path)!r}; add its tokenizer.json and "
            "tokenizer_config.json to the folder."
        )
    try:
        with quiet_transformers():
            known = recall(_TOPIC, base, _TokenizerClass)
            tokenizer = None if known is None else _load_directly(base, known)
            if tokenizer is None:
                tokenizer = _find_out(base)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            _pad_with_embedding(base, tokenizer)
    except Exception as error:
        # tokenizers raises bare Exception for a damaged tokenizer.json.
        text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:300]
        raise BaseError(f"The tokenizer of {base.name!r} cannot be loaded: {text}.") from error
    return tokenizer


def _pad_with_embedding(base: Base, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Pad with the end token where a padding token was added to the tokenizer but not to the weights."""
    rows = embeddings_of(base)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if rows is not None and isinstance(pad, int) and isinstance(end, int) and end < rows <= pad:
        tokenizer.pad_token = tokenizer.eos_token


def _load_directly(base: Base, known: _TokenizerClass) -> "PreTrainedTokenizerBase | None":
    """Load with a class of transformers; None if it is not there."""
    from transformers import PreTrainedTokenizerBase

    if not known.module.startswith("transformers."):
        return None
    try:
        found = getattr(import_module(known.module), known.name, None)
    except ImportError:
        return None
    if not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        return None
    kind: type[PreTrainedTokenizerBase] = found
    return kind.from_pretrained(base.path, local_files_only=True)


def _find_out(base: Base) -> "PreTrainedTokenizerBase":
    """Load as AutoTokenizer does, and remember the class if it gives the same when it is asked directly."""
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        base.path, local_files_only=True, trust_remote_code=False
    )
    known = _TokenizerClass(module=type(loaded).__module__, name=type(loaded).__qualname__)
    direct = _load_directly(base, known)
    if direct is not None and _state(direct) == _state(loaded):
        remember(_TOPIC, base, known)
    return loaded


def _state(tokenizer: Any) -> list[Any]:
    """Return all that makes two tokenizers behave alike."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    settings = ("special_tokens_map", "chat_template", "model_max_length", "padding_side", "truncation_side",
                "model_input_names", "clean_up_tokenization_spaces")  # fmt: skip
    return [type(tokenizer), tokenizer.is_fast, rules, *(getattr(tokenizer, name, None) for name in settings)]
