"""A classifier of the library at work: labels and probabilities for texts, pairs of texts, or their words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import LibraryError, MismatchError
from haori.core.records import Head
from haori.library import Library, OpenAdapter, open_adapter
from haori.tasks.classification.encoding import Encoded, TextEncoder, default_length, longest_input
from haori.tasks.classification.scoring import head_of, probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Classified", "Classifier", "LabelledWord", "open_classifier"]

_HOLDS = 0.5


class LabelledWord(NamedTuple):
    """A word with its label and how probable that is; None where the base has no token for the word."""

    word: str
    label: str | None
    probability: float | None


@dataclass(frozen=True)
class Classified:
    """What a classifier says of one text.

    Attributes:
        labels: The label; where a text may have several, those of a probability of at least 0.5. Empty for words.
        probabilities: Of every label, the highest first. Empty for words.
        words: The words with their labels, for a classifier of words.
        truncated: The text was cut to what the classifier reads.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    words: tuple[LabelledWord, ...]
    truncated: bool

    def to_json(self, head: Head) -> dict[str, Any]:
        """Return the answer as plain data."""
        if head.kind == "token_classification":
            found: dict[str, Any] = {"words": [word._asdict() for word in self.words]}
        elif head.multi_label:
            found = {"labels": list(self.labels), "probabilities": self.probabilities}
        else:
            found = {"label": self.labels[0], "probabilities": self.probabilities}
        return found | ({"truncated": True} if self.truncated else {})


class Classifier:
    """A classifier, loaded.

    Attributes:
        head: What it classifies, into which labels.
        name: Its name in the library, with version.
    """

    def __init__(self, opened: OpenAdapter) -> None:
        model, tokenizer = opened.model, opened.tokenizer
        self.head, self.name = head_of(model), opened.adapter.name
        self._model, self._tokenizer = model.eval(), tokenizer
        data: Any = (opened.adapter.card.recipe_data or {}).get("data")
        trained = data.get("max_length") if isinstance(data, dict) else None
        longest = default_length(longest_input(model, tokenizer, opened.base.context_length))
        self._encoder = TextEncoder(tokenizer, trained if isinstance(trained, int) else longest)

    def classify(self, texts: Sequence[str | tuple[str, str]]) -> list[Classified]:
        """Return what it says of each text, or pair of texts.

        Raises:
            MismatchError: Pairs are given to a classifier of words.
        """
        words = self.head.kind == "token_classification"
        rows: list[tuple[Encoded, list[str]]] = []
        for given in texts:
            text, pair = (given, None) if isinstance(given, str) else given
            if words and pair is not None:
                raise MismatchError(f"{self.name!r} labels the words of a text; it reads no pairs.")
            split = text.split() if words else []
            rows.append(
                (self._encoder.encode(" ".join(split) if words else text, pair, split if words else None), split)
            )
        found = probabilities(self._model, self._tokenizer, [encoded for encoded, _ in rows])
        return [self._said(encoded, split, shares) for (encoded, split), shares in zip(rows, found, strict=True)]

    def _said(self, encoded: Encoded, words: list[str], shares: "NDArray[Any]") -> Classified:
        labels = self.head.labels
        if self.head.kind == "token_classification":
            of_words = tuple(
                LabelledWord(word, None, None)
                if place is None
                else LabelledWord(word, labels[int(share.argmax())], float(share.max()))
                for word, place, share in zip(words, encoded.first_of, shares, strict=True)
            )
            return Classified((), {}, of_words, encoded.truncated)
        ranked = sorted(zip(labels, map(float, shares), strict=True), key=lambda pair: -pair[1])
        best = tuple(label for label, share in ranked if share >= _HOLDS) if self.head.multi_label else (ranked[0][0],)
        return Classified(best, dict(ranked), (), encoded.truncated)


def open_classifier(
    name: str,
    *,
    base_spec: str | None = None,
    allow_different_weights: bool = False,
    library: Library | None = None,
) -> Classifier:
    """Load a classifier of the library onto its base.

    Args:
        name: `mood`, `mood@2` or the first digits of an id.
        base_spec: Base to use instead of the one on the card.
        allow_different_weights: Accept a base of the same structure with other weights.
        library: The library; by default the one of this machine.

    Raises:
        LibraryError: There is no such adapter, or it is no classifier.
        HaoriError: Its base is not here, or another one.
    """
    held = library or Library()
    stored = held.get(name)
    if stored.card.head is None:
        raise LibraryError(
            f"{stored.name!r} is no classifier: it writes text. Ask it with `haori generate-text {stored.name}` or "
            f"`haori chat {stored.name}`."
        )
    return Classifier(
        open_adapter(name, base_spec=base_spec, allow_different_weights=allow_different_weights, library=held)
    )
