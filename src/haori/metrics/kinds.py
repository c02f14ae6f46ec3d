"""How each metric reads: its title, the direction of improvement and its scale."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "Kind"]


@dataclass(frozen=True)
class Kind:
    """How a metric is read.

    Attributes:
        title: What people call it.
        better: The direction of improvement.
        scale: `share` (0..1, shown as per cent), `score` (0..100) or `perplexity` (1 and up).
    """

    title: str
    better: Literal["higher", "lower"]
    scale: Literal["share", "score", "perplexity"]


KINDS: dict[str, Kind] = {
    "accuracy": Kind("Accuracy", "higher", "share"),
    "macro_f1": Kind("Macro F1", "higher", "share"),
    "micro_f1": Kind("Micro F1", "higher", "share"),
    "exact_match": Kind("Exact match", "higher", "share"),
    "bleu": Kind("BLEU", "higher", "score"),
    "chrf": Kind("chrF", "higher", "score"),
    "perplexity": Kind("Perplexity", "lower", "perplexity"),
}
