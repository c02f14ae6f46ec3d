"""Texts to token ids: as sentence-transformers reads them to embed, as transformers reads them to classify."""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.serve.embedding.classified import ClassifierInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextReader"]

_SIDES = {"start": "right", "end": "left"}


class TextReader:
    """Tokenises; may be used from any thread.

    Args:
        tokenizer: Of the base.
        prepare: Applied to each text that is embedded.
        longest: Longest text in tokens that is embedded.
        longest_classified: Longest that is classified.
        name: What errors call the base.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prepare: Callable[[str], str],
        *,
        longest: int,
        longest_classified: int,
        name: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._prepare = prepare
        self._longest = longest
        self._longest_classified = longest_classified
        self._name = name
        self._lock = threading.Lock()  # tokenizers are not made to be shared

    def embedded(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that are to be embedded.

        Raises:
            InputError: One is too long, or has no tokens.
        """
        prepared = [self._prepare(text) for text in texts]
        with self._lock:
            found: list[list[int]] = self._tokenizer(prepared, truncation=False, padding=False, verbose=False)[
                "input_ids"
            ]
        self._check(found, self._longest, "embeds", "Shorten it, or embed it in parts.")
        return found

    def classified(self, inputs: ClassifierInputs) -> list[list[int]]:
        """Return the ids of inputs that are to be classified.

        Raises:
            InputError: One is too long, has no tokens, or cannot be cut as asked for; or an id is none.
        """
        longest = self._longest_classified
        room = longest if inputs.truncate == -1 else inputs.truncate
        if room is not None and not 1 <= room <= longest:
            raise InputError(
                f"Texts cannot be cut to {room:,} tokens: the base {self._name!r} classifies 1 to {longest:,}."
            )
        texts = [given for given in inputs.given if isinstance(given, str)]
        ids = [list(given) for given in inputs.given if not isinstance(given, str)]
        found = self._read(texts, inputs, room) if texts else self._taken(ids, inputs, room)
        self._check(found, longest, "classifies", "Shorten it, or have it cut with truncate_prompt_tokens.")
        return found

    def _read(self, texts: Sequence[str], inputs: ClassifierInputs, room: int | None) -> list[list[int]]:
        around = self._tokenizer.num_special_tokens_to_add() if inputs.special_tokens else 0
        if room is not None and room <= around:
            raise InputError(
                f"Texts cannot be cut to {room} tokens: the tokenizer of {self._name!r} puts {around} around each; "
                f"keep {around + 1} or more."
            )
        with self._lock:
            side = self._tokenizer.truncation_side
            self._tokenizer.truncation_side = _SIDES[inputs.keep] if inputs.keep else side
            try:
                found: list[list[int]] = self._tokenizer(
                    list(texts), add_special_tokens=inputs.special_tokens, truncation=room is not None, max_length=room,
                    padding=False, verbose=False,
                )["input_ids"]  # fmt: skip
            finally:
                self._tokenizer.truncation_side = side
        return found

    def _taken(self, given: list[list[int]], inputs: ClassifierInputs, room: int | None) -> list[list[int]]:
        size = len(self._tokenizer)
        wrong = next((token for ids in given for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise InputError(f"The input has the token id {wrong}; ids of this base are 0 to {size - 1}.")
        if room is None:
            return given
        keeps_end = inputs.keep == "end" or (inputs.keep is None and self._tokenizer.truncation_side == "left")
        return [ids[-room:] if keeps_end else ids[:room] for ids in given]

    def _check(self, found: Sequence[Sequence[int]], longest: int, verb: str, advice: str) -> None:
        for number, ids in enumerate(found, start=1):
            if len(ids) > longest:
                raise InputError(
                    f"Text {number} has {len(ids):,} tokens; the base {self._name!r} {verb} at most {longest:,}. "
                    f"{advice}"
                )
            if not ids:
                raise InputError(f"Text {number} has no tokens; give at least one word.")
