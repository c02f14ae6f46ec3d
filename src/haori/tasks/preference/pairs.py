"""What is learnt from: two answers to one prompt of which one is preferred, or one answer that is good or not.

An answer is the assistant's turns after the shared prompt; the prompt's own answers are context and carry no loss.
Knows nothing about files, tokens or losses.
"""

import json
from dataclasses import dataclass, replace
from typing import Self

from haori.core.hashing import hash_data
from haori.data.conversation import Conversation, Message

__all__ = ["Judged", "Pair", "Unpaired", "judged_of", "pair_of"]


@dataclass(frozen=True)
class Pair:
    """Two conversations that share their prompt.

    Attributes:
        chosen: With the better answer.
        rejected: With the worse one.
        shared: Number of messages of the prompt.
    """

    chosen: Conversation
    rejected: Conversation
    shared: int

    @property
    def prompt(self) -> Conversation:
        """Return the messages that both share."""
        return replace(self.chosen, messages=self.chosen.messages[: self.shared])

    @property
    def hash(self) -> str:
        """Return the hash of the content."""
        return hash_data([self.chosen.hash, self.rejected.hash])

    @property
    def swapped_hash(self) -> str:
        """Return the hash of the pair that says the opposite."""
        return hash_data([self.rejected.hash, self.chosen.hash])

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Return both conversations, the chosen one first."""
        return self.chosen, self.rejected

    def with_system(self, system: str | None) -> Self:
        """Return the pair with a system message in front of both, unless it has one or there is none."""
        chosen, rejected = (side.with_system(system) for side in self.conversations)
        added = len(chosen.messages) - len(self.chosen.messages)
        return replace(self, chosen=chosen, rejected=rejected, shared=self.shared + added) if added else self

    def to_json(self) -> str:
        """Return the content as JSON; `from_json` reads it back."""
        return json.dumps({"chosen": self.chosen.to_json(), "rejected": self.rejected.to_json(), "shared": self.shared})

    @classmethod
    def from_json(cls, content: str, origin: str) -> Self:
        """Read what `to_json` wrote."""
        found = json.loads(content)
        chosen, rejected = (Conversation.from_json(found[side], origin) for side in ("chosen", "rejected"))
        return cls(chosen, rejected, found["shared"])


@dataclass(frozen=True)
class Judged:
    """One conversation whose answer is desirable or not.

    Attributes:
        answered: The conversation.
        shared: Number of messages of the prompt.
        desirable: Whether the answer is good.
    """

    answered: Conversation
    shared: int
    desirable: bool

    @property
    def prompt(self) -> Conversation:
        """Return the messages before the answer."""
        return replace(self.answered, messages=self.answered.messages[: self.shared])

    @property
    def hash(self) -> str:
        """Return the hash of the content."""
        return hash_data([self.answered.hash, self.desirable])

    @property
    def swapped_hash(self) -> str:
        """Return the hash of the row that says the opposite."""
        return hash_data([self.answered.hash, not self.desirable])

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """Return the conversation."""
        return (self.answered,)

    def with_system(self, system: str | None) -> Self:
        """Return the row with a system message in front, unless it has one or there is none."""
        answered = self.answered.with_system(system)
        added = len(answered.messages) - len(self.answered.messages)
        return replace(self, answered=answered, shared=self.shared + added) if added else self

    def to_json(self) -> str:
        """Return the content as JSON; `from_json` reads it back."""
        found = {"answered": self.answered.to_json(), "shared": self.shared, "desirable": self.desirable}
        return json.dumps(found)

    @classmethod
    def from_json(cls, content: str, origin: str) -> Self:
        """Read what `to_json` wrote."""
        found = json.loads(content)
        return cls(Conversation.from_json(found["answered"], origin), found["shared"], found["desirable"])


class Unpaired(ValueError):
    """Two conversations that make no pair; `reason` is `same_answers` or `prompts_differ`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def pair_of(chosen: Conversation, rejected: Conversation) -> Pair:
    """Return two conversations as a pair, their shared prompt without loss.

    Raises:
        Unpaired: They are the same, or differ before an answer.
    """
    if chosen.messages == rejected.messages:
        raise Unpaired("same_answers")
    shared = 0
    for one, other in zip(chosen.messages, rejected.messages, strict=False):
        if one != other:
            break
        shared += 1
    answers = [row.messages[shared]["role"] for row in (chosen, rejected) if len(row.messages) > shared]
    if not shared or answers != ["assistant", "assistant"] or chosen.tools != rejected.tools:
        raise Unpaired("prompts_differ")
    return Pair(_scored_from(chosen, shared), _scored_from(rejected, shared), shared)


def judged_of(answered: Conversation, *, desirable: bool) -> Judged:
    """Return a conversation with its last answer judged."""
    shared = len(answered.messages) - 1
    return Judged(_scored_from(answered, shared), shared, desirable)


def _scored_from(row: Conversation, start: int) -> Conversation:
    messages: list[Message] = [
        {**message, "loss": False} if place < start and message["role"] == "assistant" else message
        for place, message in enumerate(row.messages)
    ]
    return replace(row, messages=tuple(messages))
