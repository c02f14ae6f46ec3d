r"""Cleaning of one row: control characters, and whether anything is left to learn from.

Line breaks become `\n`. Characters that are neither text nor `\n` or `\t` are removed, lone surrogates among
them, because no tokenizer can encode those. Nothing else about the text is changed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from haori.data.conversation import Conversation, Message, said

__all__ = ["clean_row", "clean_text", "empty_turns", "is_empty", "without_loss"]

_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean_text(text: str) -> tuple[str, bool]:
    """Return the cleaned text and whether it held control characters (a plain line break is none)."""
    dirty = _CONTROL.search(text) is not None
    if "\r" in text or dirty:
        text = _CONTROL.sub("", _BREAKS.sub("\n", text))
    return text, dirty


def clean_row(row: Conversation) -> tuple[Conversation, bool]:
    """Return the cleaned row and whether any of its texts held control characters."""
    if row.text is not None:
        text, dirty = clean_text(row.text)
        return (replace(row, text=text) if text != row.text else row), dirty
    messages: list[Message] = []
    any_dirty = False
    for message in row.messages:
        content, dirty = clean_text(message["content"])
        any_dirty |= dirty
        cleaned: Message = {**message, "content": content}
        if "reasoning_content" in message:
            cleaned["reasoning_content"], dirty = clean_text(message["reasoning_content"])
            any_dirty |= dirty
        if "tool_calls" in message:
            cleaned["tool_calls"], dirty = _clean_values(message["tool_calls"])
            any_dirty |= dirty
        messages.append(cleaned)
    tools, dirty = _clean_values(row.tools)
    return replace(row, messages=tuple(messages), tools=tuple(tools)), any_dirty | dirty


def _clean_values(value: Any) -> tuple[Any, bool]:
    """Clean every text in a value, however deep."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        found = {clean_text(name)[0]: _clean_values(part) for name, part in value.items()}
        return {name: part for name, (part, _) in found.items()}, any(dirty for _, dirty in found.values())
    if isinstance(value, (list, tuple)):
        parts = [_clean_values(part) for part in value]
        return [part for part, _ in parts], any(dirty for _, dirty in parts)
    return value, False


def is_empty(row: Conversation) -> bool:
    """Say whether there is nothing to learn: no text, no answer, or no question where there should be one."""
    if row.text is not None:
        return not row.text.strip()
    answers = [said(m).strip() for m in row.messages if m["role"] == "assistant"]
    asked = [said(m).strip() for m in row.messages if m["role"] != "assistant"]
    return not any(answers) or (bool(asked) and not any(asked))


def empty_turns(row: Conversation) -> list[int]:
    """Return the places of turns in which nothing is said, but for answers that are not trained."""
    return [
        place
        for place, message in enumerate(row.messages)
        if message["role"] in {"user", "assistant"}
        and not said(message).strip()
        and not message.get("reasoning_content", "").strip()
        and message.get("loss") is not False
    ]


def without_loss(row: Conversation, places: Sequence[int]) -> Conversation:
    """Return the row with the answers at these places kept as context that is not trained."""
    messages: list[Message] = [
        {**message, "loss": False} if place in places and message["role"] == "assistant" else message
        for place, message in enumerate(row.messages)
    ]
    return replace(row, messages=tuple(messages))
