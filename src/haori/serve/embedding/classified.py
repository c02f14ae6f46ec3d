"""What a classifier is asked, and what it answers. Knows nothing about HTTP, models or tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from haori.core.records import Head

__all__ = ["Classified", "ClassifierInputs", "scores_of"]


@dataclass(frozen=True)
class ClassifierInputs:
    """Texts to classify, or token ids.

    Attributes:
        given: One text or one list of ids for each answer.
        special_tokens: Whether the tokenizer puts its own tokens around a text; ids are taken as they are.
        truncate: Keep at most so many tokens; -1 for as many as the base reads, None to refuse what is longer.
        keep: Which end of a text that is cut is kept; None for what the tokenizer does.
        activated: Whether probabilities are wanted, or the logits.
    """

    given: Sequence[str] | Sequence[Sequence[int]]
    special_tokens: bool = True
    truncate: int | None = None
    keep: Literal["start", "end"] | None = None
    activated: bool = True


class Classified(NamedTuple):
    """The answer: the labels, a score of each for every input, and how many tokens each input had."""

    labels: Sequence[str]
    scores: Sequence[Sequence[float]]
    tokens: Sequence[int]


def scores_of(head: Head, logits: Sequence[float], *, activated: bool) -> list[float]:
    """Return the probabilities of a head's labels: by softmax, or each by itself where several may hold."""
    if not activated:
        return list(logits)
    if head.multi_label:
        return [1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) for x in logits]
    highest = max(logits)
    powers = [math.exp(x - highest) for x in logits]
    total = sum(powers)
    return [power / total for power in powers]
