"""Keeps control tokens that stand in what people wrote (an end-of-turn, say) text: they must not end turns.

A tokenizer reads `<|im_end|>` as its control token wherever it stands, so a user who writes it could close his own turn
and open the system's. Before a template is filled, each such place in a message is put behind a mark that no tokenizer
knows; after it, text with marks is encoded piece by piece, the marked pieces as plain text. Text without control tokens
is not touched, nor is a last end-of-sequence token of an answer, which many data sets bring along.

Knows nothing about templates.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ControlTokens", "encode_marked", "mark_control_tokens", "special_texts"]

ControlTokens = Literal["text", "allow"]
"""Whether control tokens in messages are read as text or as tokens."""

_MARK = "\uf8e7"  # of Unicode's private use area; where a text has it itself, it is doubled
_MARKED = re.compile(f"{_MARK}(?:{_MARK}|(\\d+);)")


class _Specials:
    """The control tokens of a tokenizer."""

    def __init__(self, texts: tuple[str, ...], size: int) -> None:
        self.texts = texts
        self.size = size
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.numbers = {text: number for number, text in enumerate(texts)}


_KNOWN: "WeakKeyDictionary[PreTrainedTokenizerBase, _Specials]" = WeakKeyDictionary()


def special_texts(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the texts that the tokenizer reads as control tokens, such as an end-of-turn."""
    return _specials(tokenizer).texts


def mark_control_tokens(
    tokenizer: "PreTrainedTokenizerBase", turn: Mapping[str, Any], control_tokens: ControlTokens = "text"
) -> dict[str, Any]:
    """Return a turn as a template is to have it, for `encode_marked` to read what comes out.

    Control tokens are marked in all of its text, of an answer all but an end-of-sequence at its end; with `allow`,
    none are.
    """
    if control_tokens == "allow":
        return {name: _doubled(value) for name, value in turn.items()}
    marked: dict[str, Any] = {name: _marked(tokenizer, value) for name, value in turn.items()}
    content, end = turn.get("content"), tokenizer.eos_token
    if turn.get("role") == "assistant" and isinstance(content, str) and end and content.endswith(end):
        marked["content"] = _marked(tokenizer, content.removesuffix(end)) + end
    return marked


def encode_marked(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the ids of what a template made of marked turns: control tokens, except where they are marked."""
    if _MARK not in text:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids: list[int] = []
    for piece in _pieces(_specials(tokenizer), text):
        plain = _MARK in piece
        if plain:
            piece = _unmarked(_specials(tokenizer), piece)  # noqa: PLW2901 - the same piece, as it is to be read
        ids += tokenizer(piece, add_special_tokens=False, verbose=False, split_special_tokens=plain)["input_ids"]
    return ids


def _marked(tokenizer: "PreTrainedTokenizerBase", value: Any) -> Any:
    specials = _specials(tokenizer)
    return _in_texts(
        value,
        lambda text: specials.pattern.sub(
            lambda found: f"{_MARK}{specials.numbers[found[0]]};", text.replace(_MARK, 2 * _MARK)
        ),
    )


def _doubled(value: Any) -> Any:
    return _in_texts(value, lambda text: text.replace(_MARK, 2 * _MARK))


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text in a value, however deep."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _in_texts(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_texts(part, change) for part in value]
    return value


def _unmarked(specials: _Specials, text: str) -> str:
    return _MARKED.sub(lambda found: _MARK if found[1] is None else specials.texts[int(found[1])], text)


def _pieces(specials: _Specials, text: str) -> Iterable[str]:
    """Cut a text between control tokens where a stretch has a mark; what has none stays together."""
    held, done = "", 0
    for found in specials.pattern.finditer(text):
        stretch = text[done : found.start()]
        if _MARK in stretch:
            yield from filter(None, (held, stretch))
            held = found[0]
        else:
            held += stretch + found[0]
        done = found.end()
    rest = text[done:]
    if _MARK in rest:
        yield from filter(None, (held, rest))
    else:
        yield held + rest


def _specials(tokenizer: "PreTrainedTokenizerBase") -> _Specials:
    found = _KNOWN.get(tokenizer)
    if found is None or found.size != len(tokenizer):
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        texts = dict.fromkeys([*added, *([tokenizer.eos_token] if tokenizer.eos_token else [])])
        found = _KNOWN[tokenizer] = _Specials(tuple(texts), len(tokenizer))
    return found
