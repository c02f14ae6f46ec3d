"""Metrics: pure functions of answers and references, and how each one is read.

Nothing here knows a model, a tokenizer or a file. Accuracy-like figures are shares in 0..1; BLEU and chrF are
sacrebleu's 0..100. F1 is scikit-learn's, BLEU and chrF are sacrebleu's own numbers.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "KINDS",
    "NORMALISATION",
    "CorpusScore",
    "Kind",
    "accuracy",
    "bleu",
    "bleu_metric",
    "chrf",
    "chrf_metric",
    "confusion_matrix",
    "exact_match",
    "f1",
    "normalise",
    "perplexity",
]

NORMALISATION = "Unicode NFKC, case-folded, runs of white space as one space, one closing full stop dropped"
_UNSPACED_SHARE = 0.3  # more letters than this from scripts without spaces: BLEU counts characters


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


class CorpusScore(NamedTuple):
    """A sacrebleu score in 0..100 and the signature that lets others repeat it."""

    value: float
    signature: str


def perplexity(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> float:
    """Return the token-weighted perplexity, exp(sum of NLL / sum of tokens): never a mean of row means.

    Args:
        nll: Sum of negative log-likelihoods of each row, in nats.
        tokens: Number of measured tokens of each row.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(np.sum(nll) / np.sum(tokens)))


def normalise(text: str) -> str:
    """Return `text` as exact match compares it; `NORMALISATION` says the rule in words."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").rstrip()


def exact_match(answers: Sequence[str], references: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Say for each row whether the normalised answer equals the normalised reference."""
    pairs = zip(answers, references, strict=True)
    return np.array([normalise(answer) == normalise(reference) for answer, reference in pairs], dtype=bool)


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of rows whose answer is the reference."""
    return float(np.mean([answer == reference for answer, reference in zip(answers, references, strict=True)]))


def f1(
    answers: Sequence[str],
    references: Sequence[str],
    labels: Sequence[str],
    average: Literal["macro", "micro"],
) -> float:
    """Return F1 by scikit-learn, F1 of a label = 2 TP / (2 TP + FP + FN).

    macro: the mean over labels; a label that is neither expected nor answered is left out of the mean.
    micro: from the counts summed over labels; with one answer per row it equals accuracy.
    """
    from sklearn.metrics import f1_score

    names = [*labels]
    zero = np.nan if average == "macro" else 0.0
    value = f1_score([*references], [*answers], labels=names, average=average, zero_division=zero)
    return float(value)


def confusion_matrix(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Count rows by reference (down) and answer (across), in the order of `labels`."""
    place = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for answer, reference in zip(answers, references, strict=True):
        counts[place[reference], place[answer]] += 1
    return tuple(tuple(int(count) for count in row) for row in counts)


def bleu(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Return corpus BLEU on raw text, one reference per row (sacrebleu defaults).

    Text in scripts without spaces (Chinese, Japanese, Thai) is tokenised by character; the signature says so.
    """
    return _corpus(bleu_metric(references), answers, references)


def chrf(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Return corpus chrF2 on raw text, one reference per row (sacrebleu defaults)."""
    return _corpus(chrf_metric(), answers, references)


def bleu_metric(references: Sequence[str]) -> Any:
    """Return sacrebleu's BLEU with the tokenisation that suits the references."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="char" if _unspaced(references) else "13a")


def chrf_metric() -> Any:
    """Return sacrebleu's chrF."""
    from sacrebleu.metrics import CHRF

    return CHRF()


def _corpus(metric: Any, answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    score = float(metric.corpus_score([*answers], [[*references]]).score)
    return CorpusScore(score if math.isfinite(score) else 0.0, str(metric.get_signature()))


def _unspaced(texts: Sequence[str]) -> bool:
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(_is_unspaced(ord(letter)) for letter in letters) > _UNSPACED_SHARE * max(1, len(letters))


def _is_unspaced(code: int) -> bool:
    # Thai and Lao; kana; CJK ideographs with extensions A, compatibility and the supplementary planes.
    ranges = ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
    return any(low <= code <= high for low, high in ranges)
