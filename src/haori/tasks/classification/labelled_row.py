"""One row of a classifier: a text, a pair of texts or words, and the names of its labels."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from haori.core.hashing import hash_data
from haori.data.conversation import Conversation

__all__ = ["LabelledRow"]


@dataclass(frozen=True)
class LabelledRow:
    """A row, cleaned.

    Attributes:
        text: The text; the words joined by spaces where the row has words.
        labels: Its label, its labels (sorted, perhaps none), or the label of each word.
        origin: Where it came from, as `file:row`, for people.
        pair: The second text of a pair.
        words: The words, where each has a label.
    """

    text: str
    labels: tuple[str, ...]
    origin: str
    pair: str | None = None
    words: tuple[str, ...] | None = None

    @property
    def body(self) -> str:
        """Return all that is said, without labels."""
        return self.text if self.pair is None else f"{self.text}\n{self.pair}"

    @cached_property
    def hash(self) -> str:
        """Return the hash of text and labels (the origin does not count)."""
        return hash_data([self.text, self.pair, self.words, self.labels])

    @property
    def is_empty(self) -> bool:
        """Say whether there is nothing to read."""
        return not self.text.strip() or (self.pair is not None and not self.pair.strip())

    def as_text(self) -> Conversation:
        """Return what is said as plain text, which the split and the search for leaks look at."""
        return Conversation((), self.origin, text=self.body)

    def to_json(self) -> str:
        """Return the content as JSON; `from_json` reads it back."""
        content = {"text": self.text, "pair": self.pair, "words": self.words, "labels": self.labels}
        return json.dumps({key: value for key, value in content.items() if value is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, content: str, origin: str) -> Self:
        """Read what `to_json` wrote."""
        found = json.loads(content)
        words = found.get("words")
        return cls(
            found["text"], tuple(found["labels"]), origin, found.get("pair"), None if words is None else tuple(words)
        )
