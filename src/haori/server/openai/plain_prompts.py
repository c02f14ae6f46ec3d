"""The prompts of a plain completion: text or token ids, and what of them is said again in the reply."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from haori.bases.detokenise import TextStream
from haori.data import PromptFormat
from haori.server.errors import ApiError

__all__ = ["EchoedPrompt", "PlainPrompts", "check_ids", "text_ids"]


class EchoedPrompt(NamedTuple):
    """A prompt as a reply says it: its text, its tokens, and at which character each of these begins."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[int]


class PlainPrompts:
    """The prompts of one request, once they are read.

    Args:
        given: Each as text or as token ids.
        echo: Whether the reply says them again.
        special: Whether the tokenizer puts its own tokens around a text.
    """

    def __init__(self, given: Sequence[str | list[int]], *, echo: bool, special: bool = True) -> None:
        self._given = given
        self._echo = echo
        self._special = special
        self._echoed: list[EchoedPrompt] = []

    def read(self, speech: PromptFormat) -> Sequence[Sequence[int]]:
        """Return the token ids of each prompt.

        Raises:
            ApiError: A prompt is empty, or holds an id that is not the tokenizer's.
        """
        tokenizer = speech.tokenizer
        found = [
            text_ids(tokenizer, prompt, special=self._special) if isinstance(prompt, str) else prompt
            for prompt in self._given
        ]
        if not all(found):
            raise ApiError(400, "A prompt is empty; give at least one token.", param="prompt", code="invalid_value")
        for ids in found:
            check_ids(tokenizer, ids, "prompt")
        if self._echo:
            self._echoed = [
                _echoed(tokenizer, prompt, ids, special=self._special)
                for prompt, ids in zip(self._given, found, strict=True)
            ]
        return found

    def echoed(self, number: int) -> EchoedPrompt | None:
        """Return what the reply says of a prompt; None if nothing."""
        return self._echoed[number] if self._echo else None


def text_ids(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the ids of plain text; `special` for those that the tokenizer itself puts around it."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def check_ids(tokenizer: Any, ids: Sequence[int], field: str) -> None:
    """Refuse ids that are not the tokenizer's.

    Raises:
        ApiError: There is one.
    """
    size = len(tokenizer)
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        message = f"{field!r} has the token id {wrong}; ids of this base are 0 to {size - 1}."
        raise ApiError(400, message, param=field, code="invalid_value")


def _echoed(tokenizer: Any, given: str | list[int], ids: Sequence[int], *, special: bool) -> EchoedPrompt:
    if isinstance(given, str) and tokenizer.is_fast:
        offsets, latest = [], 0
        read = tokenizer(given, add_special_tokens=special, verbose=False, return_offsets_mapping=True)
        for start, _ in read["offset_mapping"]:
            latest = max(latest, start)  # tokens that the tokenizer puts around the text are said to begin at 0
            offsets.append(latest)
        return EchoedPrompt(given, ids, offsets)
    stream, text, offsets = TextStream(tokenizer, shown=tokenizer.all_special_ids), "", []
    for token in ids:
        offsets.append(len(text))
        text += stream.push(token)
    text += stream.finish()
    return EchoedPrompt(given if isinstance(given, str) else text, ids, offsets)
