"""Turns tokens into text: all at once, one by one as they are generated, or each for itself as bytes.

`TextStream` ends the text before a stop string. What it has returned so far, joined, is what the tokenizer decodes from
all tokens at once (without special tokens, except those that are to be shown, and without cleaning up spaces), cut at
the stop string that is complete first. Each token costs the same, however long the answer is. Text that a later token
could still change, or make part of a stop string, is held back.
"""

import codecs
import re
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

__all__ = ["TextStream", "Vocabulary", "text_of", "vocabulary_of"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INCOMPLETE = "\ufffd"


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    """Return the text of tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
        vocabulary = vocabulary_of(tokenizer)
        self._decoder: _Decoder = _ByteText(vocabulary) if vocabulary.byte_level else _WindowText(vocabulary)
        self._stops = [_StopString(text) for text in stop]
        self._first_letters = frozenset(text[0] for text in stop)
        self._shown = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in shown}
        self._held = ""  # the beginning of a stop string, or of several
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
        if not self._held and self._first_letters.isdisjoint(new):
            return new
        possible = [stop for stop in self._stops if stop.matched or stop.text[0] in new]
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
        for index in range(1, len(text)):
            size = self._shorter[index - 1]
            while size and text[size] != text[index]:
                size = self._shorter[size - 1]
            self._shorter[index] = size + (text[size] == text[index])

    def advance(self, character: str) -> int:
        """Go on by a character, at most until complete, and return `matched`."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.text[self.matched] == character
        return self.matched


class Vocabulary:
    """What is asked of a tokenizer for every token, looked up once; made by `vocabulary_of`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_fast = bool(getattr(tokenizer, "is_fast", False))  # not every backend of transformers says so
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def byte_level(self) -> bool:
        """Say whether tokens stand for bytes, as in GPT-2, and nothing else is done to them."""
        from tokenizers.decoders import ByteLevel

        return self._is_fast and isinstance(self._tokenizer.backend_tokenizer.decoder, ByteLevel)

    @cached_property
    def _skipped(self) -> frozenset[int]:
        if not self._is_fast:
            return frozenset(self._tokenizer.all_special_ids)
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(token for token, entry in added if entry.special)

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(self._tokenizer.all_special_tokens)

    @cached_property
    def _spells_bytes(self) -> bool:
        """Say whether single tokens are written in GPT-2's alphabet of bytes, whatever the decoder adds to that."""
        space = self._tokenizer.convert_tokens_to_ids("Ġ")  # others have no reason to have this letter
        return space is not None and self._tokenizer.convert_ids_to_tokens(space) == "Ġ"

    def name(self, token: int) -> str | None:
        """Return the token as it stands in the vocabulary; None for special and unknown ones, which are not shown."""
        return None if token in self._skipped else self._tokenizer.convert_ids_to_tokens(token)

    def bytes_alone(self, token: int) -> bytes:
        """Return the bytes that a single token stands for; those of its name, if it is special."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if name in self._special:
            return name.encode()
        if found := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(found[1], 16)])
        return (_spelt_bytes(name) if self._spells_bytes else None) or name.replace("▁", " ").encode()

    def text_alone(self, token: int) -> str:
        """Return the text of a single token; one that is no whole character is written as its bytes."""
        raw = self.bytes_alone(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes_within(self, token: int) -> bytes:
        """Return what a token of a byte-level vocabulary adds to a text; nothing, if it is special."""
        if token not in self._bytes:
            name = self.name(token) or ""
            spelt = _spelt_bytes(name)
            self._bytes[token] = name.encode() if spelt is None else spelt
        return self._bytes[token]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of a run of tokens."""
        return text_of(self._tokenizer, tokens)


_VOCABULARIES: "WeakKeyDictionary[Any, Vocabulary]" = WeakKeyDictionary()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Return the vocabulary of a tokenizer, the same one each time."""
    if tokenizer not in _VOCABULARIES:
        _VOCABULARIES[tokenizer] = Vocabulary(tokenizer)
    return _VOCABULARIES[tokenizer]


def _spelt_bytes(name: str) -> bytes | None:
    """Return the bytes that a token of a byte-level vocabulary is spelt with; None if it is not."""
    byte_of = _byte_alphabet()
    return bytes(byte_of[letter] for letter in name) if all(letter in byte_of for letter in name) else None


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in of each byte: itself where printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class _Decoder(Protocol):
    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _ByteText:
    """Tokens are bytes: an incomplete character waits for the next ones, and what is no UTF-8 becomes U+FFFD."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._characters.decode(self._vocabulary.bytes_within(token))

    def finish(self) -> str:
        return self._characters.decode(b"", final=True)


class _WindowText:
    """Decodes the new tokens after those that were decoded last, which settle whether a space comes between.

    Byte tokens wait for the next token that is none: only all of a run of them together is text, or is not.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._shown: list[int] = []
        self._new: list[int] = []
        self._waits = False

    def push(self, token: int) -> str:
        name = self._vocabulary.name(token)
        if name is None:
            return ""
        self._new.append(token)
        self._waits = bool(_BYTE_TOKEN.fullmatch(name))
        return "" if self._waits else self._take(final=False)

    def finish(self) -> str:
        return self._take(final=True) if self._new else ""

    def _take(self, *, final: bool) -> str:
        before, now = (self._vocabulary.decode(tokens) for tokens in (self._shown, self._shown + self._new))
        if not final and (len(now) <= len(before) or now.endswith(_INCOMPLETE)):
            return ""
        self._shown, self._new = self._new, []
        return now[len(before) :]
