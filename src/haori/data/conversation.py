"""One row of text data: a conversation, or a plain text.

Every format is turned into this form. A row is identified by the hash of its content, never by its place.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, Self, TypedDict

from haori.core.hashing import hash_data

__all__ = ["ROLES", "Conversation", "Message", "normalise", "said", "words"]

ROLES = ("system", "user", "assistant", "tool")

_PUNCTUATION = re.compile(r"[\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f\u3000-\u303f]+")
# Scripts written without spaces: each character counts as a word (Thai to Myanmar, Khmer, kana, Han).
_UNSPACED = re.compile(r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")


class Message(TypedDict):
    """One turn.

    `loss: false` keeps an assistant's turn as context that is not trained; `reasoning_content` is what the assistant
    thinks before it answers, for chat templates that show it. `tool_calls` are the functions that an assistant calls,
    in OpenAI's form with `arguments` as an object; `tool_call_id` and `name` say whose result a tool's message is.
    """

    role: str
    content: str
    loss: NotRequired[bool]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Conversation:
    """A row: messages that end with the assistant's, or a `text` and no messages.

    Attributes:
        messages: The turns, oldest first; empty for a plain-text row.
        origin: Where it came from, as `file:row`, for people.
        text: The text of a plain-text row.
        tools: Functions that the assistant is told of, in OpenAI's form.
    """

    messages: tuple[Message, ...]
    origin: str
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def uses_tools(self) -> bool:
        """Say whether there are tools or calls of them."""
        return bool(self.tools) or any(message.get("tool_calls") for message in self.messages)

    @property
    def hash(self) -> str:
        """Return the hash of the content (the origin does not count)."""
        return hash_data([self.text, self.messages, *([self.tools] if self.tools else [])])

    @property
    def opening(self) -> str:
        """Return what is said before the assistant's first turn, or the whole text."""
        if self.text is not None:
            return self.text
        first = next((i for i, m in enumerate(self.messages) if m["role"] == "assistant"), len(self.messages))
        return "\n".join(said(m) for m in self.messages[:first]) or self.body

    @property
    def body(self) -> str:
        """Return all that is thought and said, without roles."""
        if self.text is not None:
            return self.text
        parts = ((m.get("reasoning_content", ""), said(m)) for m in self.messages)
        return "\n".join("\n".join(pair) if pair[0] else pair[1] for pair in parts)

    def with_system(self, system: str | None) -> Self:
        """Return the row with a system message in front, unless it has one, is plain text, or there is none."""
        if system is None or self.text is not None or any(m["role"] == "system" for m in self.messages):
            return self
        return replace(self, messages=(Message(role="system", content=system), *self.messages))

    def to_json(self) -> str:
        """Return the content as JSON; `from_json` reads it back."""
        content: dict[str, Any] = {"messages": self.messages} if self.text is None else {"text": self.text}
        if self.tools:
            content["tools"] = self.tools
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, content: str, origin: str) -> Self:
        """Read what `to_json` wrote."""
        found = json.loads(content)
        return cls(
            messages=tuple(found.get("messages", ())), origin=origin, text=found.get("text"),
            tools=tuple(found.get("tools", ())),
        )  # fmt: skip


def said(message: Message) -> str:
    """Return what a message says: its text, and its calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return "\n".join(parts if message["content"] else parts[1:])


def normalise(text: str) -> str:
    """Return text with case, width, and runs of white space made equal, as the exact leak check compares it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation; a character of an unspaced script is a word."""
    spaced = _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return _UNSPACED.sub(r" \1 ", spaced).split()
