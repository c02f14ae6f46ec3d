"""Turns tokens into text one by one, and ends the text before a stop string.

What was pushed so far, put together, is what the tokenizer decodes from all tokens at once (without special tokens,
but for those that are to be shown, and without cleaning up spaces), cut at the stop string that is complete first.
Each token costs the same, however long the answer is. Text that a later token could still change, or make part of a
stop string, is held back.
"""

import codecs
import re
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

__all__ = ["TextStream"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: A transformers tokenizer.
        stop: The text ends before the first of these that is complete; where two end at once, before the longer.
        shown: Special tokens that are part of the text.

    Attributes:
        stopped: Whether a stop string occurred. Later tokens are ignored.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), shown: Collection[int] = ()) -> None:
        vocabulary = _vocabulary(tokenizer)
        self._decoder: _Decoder = _ByteText(vocabulary) if vocabulary.byte_level else _WindowText(vocabulary)
        self._stops = [_StopString(text) for text in stop]
        self._shown = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in shown}
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that is certain now and was not before; often empty."""
        if self.stopped:
            return ""
        if token in self._shown:
            return self._sendable(self._decoder.finish() + self._shown[token])
        return self._sendable(self._decoder.push(token))

    def finish(self) -> str:
        """Return the rest, after the last token."""
        if self.stopped:
            return ""
        text = self._sendable(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _sendable(self, new: str) -> str:
        possible = [stop for stop in self._stops if stop.matched or stop.text[0] in new]
        if not possible:
            return new  # nothing is held: that would be the beginning of a stop string
        text = self._held + new
        for end in range(len(self._held) + 1, len(text) + 1):
            matched = [stop.advance(text[end - 1]) for stop in possible]
            complete = [size for size, stop in zip(matched, possible, strict=True) if size == len(stop.text)]
            if complete:
                self.stopped, self._held = True, ""
                return text[: end - max(complete)]
        sure = len(text) - max(stop.matched for stop in possible)
        self._held = text[sure:]
        return text[:sure]


class _StopString:
    """Knuth-Morris-Pratt: `matched` characters at the end of the text so far are the beginning of the stop string."""

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._shorter = [0] * len(text)  # the next shorter beginning that the first i + 1 characters end in
        for place in range(1, len(text)):
            size = self._shorter[place - 1]
            while size and text[size] != text[place]:
                size = self._shorter[size - 1]
            self._shorter[place] = size + (text[size] == text[place])

    def advance(self, character: str) -> int:
        """Go on by a character, at most until complete, and return `matched`."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched


class _Vocabulary:
    """What is asked of a tokenizer for every token, looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def byte_level(self) -> bool:
        """Say whether tokens stand for bytes, as in GPT-2, and nothing else is done to them."""
        from tokenizers.decoders import ByteLevel

        return bool(self._tokenizer.is_fast) and isinstance(self._tokenizer.backend_tokenizer.decoder, ByteLevel)

    @cached_property
    def _skipped(self) -> frozenset[int]:
        if not self._tokenizer.is_fast:
            return frozenset(self._tokenizer.all_special_ids)
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(token for token, entry in added if entry.special)

    def piece(self, token: int) -> str | None:
        """Return the token as it stands in the vocabulary; None for special and unknown ones, which are not shown."""
        return None if token in self._skipped else self._tokenizer.convert_ids_to_tokens(token)

    def bytes_of(self, token: int) -> bytes:
        """Return what a token of a byte-level vocabulary stands for."""
        if token not in self._bytes:
            piece = self.piece(token) or ""
            byte_of = _byte_alphabet()
            known = all(character in byte_of for character in piece)
            self._bytes[token] = bytes(byte_of[character] for character in piece) if known else piece.encode()
        return self._bytes[token]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of a run of tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


_VOCABULARIES: "WeakKeyDictionary[Any, _Vocabulary]" = WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> _Vocabulary:
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
    return _VOCABULARIES[tokenizer]


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in of each byte: itself where printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class _Decoder(Protocol):
    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _ByteText:
    """Tokens are bytes: an incomplete character waits for the next ones, and what is no UTF-8 becomes U+FFFD."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._characters.decode(self._vocabulary.bytes_of(token))

    def finish(self) -> str:
        return self._characters.decode(b"", final=True)


class _WindowText:
    """Decodes the new tokens after those of the last piece, which settle whether a space comes between.

    Byte tokens wait for the next token that is none: only all of a run of them together is text, or is not.
    """

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._shown: list[int] = []
        self._new: list[int] = []
        self._waits = False

    def push(self, token: int) -> str:
        piece = self._vocabulary.piece(token)
        if piece is None:
            return ""
        self._new.append(token)
        self._waits = bool(_BYTE_TOKEN.fullmatch(piece))
        return "" if self._waits else self._take(final=False)

    def finish(self) -> str:
        return self._take(final=True) if self._new else ""

    def _take(self, *, final: bool) -> str:
        before, now = (self._vocabulary.decode(tokens) for tokens in (self._shown, self._shown + self._new))
        if not final and (len(now) <= len(before) or now.endswith(_INCOMPLETE)):
            return ""
        self._shown, self._new = self._new, []
        return now[len(before) :]
