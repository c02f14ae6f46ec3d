"""Metrics of generated text: exact match after normalisation, and sacrebleu's own BLEU and chrF in 0..100."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, Sums

__all__ = ["NORMALISATION", "CorpusScore", "bleu", "bleu_sums", "chrf", "chrf_sums", "exact_match", "normalise"]

NORMALISATION = "Unicode NFKC, case-folded, runs of white space as one space, one closing full stop dropped"
_UNSPACED_SHARE = 0.3  # more letters than this from scripts without spaces: BLEU counts characters
_ORDERS = 4  # BLEU's n-gram orders


class CorpusScore(NamedTuple):
    """A sacrebleu score in 0..100 and the signature that lets others repeat it."""

    value: float
    signature: str


def normalise(text: str) -> str:
    """Return `text` as exact match compares it; `NORMALISATION` says the rule in words."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.removesuffix(".").rstrip()


def exact_match(answers: Sequence[str], references: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Say for each row whether the normalised answer equals the normalised reference."""
    pairs = zip(answers, references, strict=True)
    return np.array([normalise(answer) == normalise(reference) for answer, reference in pairs], dtype=bool)


def bleu(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Return corpus BLEU on raw text, one reference per row (sacrebleu defaults).

    Text in scripts without spaces (Chinese, Japanese, Thai) is tokenised by character; the signature says so.
    """
    return _corpus(_bleu_metric(references), answers, references)


def chrf(answers: Sequence[str], references: Sequence[str]) -> CorpusScore:
    """Return corpus chrF2 on raw text, one reference per row (sacrebleu defaults)."""
    return _corpus(_chrf_metric(), answers, references)


def bleu_sums(answers: Sequence[str], references: Sequence[str]) -> Sums:
    """Corpus BLEU from answer length, reference length, matches and totals of each n-gram order."""
    rows = _bleu_metric(references)._extract_corpus_statistics([*answers], [[*references]])
    return Sums(np.asarray(rows, float), _bleu_score)


def chrf_sums(answers: Sequence[str], references: Sequence[str]) -> Sums:
    """Corpus chrF from (answer, reference, matched) counts of each character n-gram order."""
    metric = _chrf_metric()
    rows = metric._extract_corpus_statistics([*answers], [[*references]])
    beta_squared = float(metric.beta) ** 2
    return Sums(np.asarray(rows, float), lambda sums: _chrf_score(sums, beta_squared))


def _bleu_score(sums: Array) -> Array:
    """BLEU = BP exp(mean log p_n), `exp` smoothing, as sacrebleu's compute_bleu."""
    answer_length, reference_length = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    ratio = np.divide(reference_length, answer_length, out=np.ones_like(answer_length), where=answer_length > 0)
    brevity = np.where(answer_length < reference_length, np.exp(1 - ratio), 1.0)
    log_precision = np.zeros_like(answer_length)
    smoothing = np.ones_like(answer_length)
    for order in range(_ORDERS):
        missed = (correct[..., order] == 0) & (total[..., order] > 0)
        smoothing = np.where(missed, 2 * smoothing, smoothing)
        hits = np.where(missed, 1 / smoothing, correct[..., order])
        precision = np.divide(hits, total[..., order], out=np.ones_like(hits), where=total[..., order] > 0)
        log_precision = log_precision + np.log(precision)
    # No answer of four tokens, or no match at all: sacrebleu's score is 0.
    scored = (total > 0).all(axis=-1) & (correct > 0).any(axis=-1)
    return np.asarray(np.where(scored, 100 * brevity * np.exp(log_precision / _ORDERS), 0.0))


def _chrf_score(sums: Array, beta_squared: float) -> Array:
    """ChrF = F_beta of precision and recall averaged over the orders present on both sides."""
    counts = sums.reshape(*sums.shape[:-1], -1, 3)  # [..., order, (answer, reference, match)]
    answered, expected, matched = counts[..., 0], counts[..., 1], counts[..., 2]
    present = (answered > 0) & (expected > 0)
    orders = np.maximum(1, present.sum(axis=-1))
    zeros = np.zeros_like(matched)
    precision = np.divide(matched, answered, out=zeros.copy(), where=present).sum(axis=-1) / orders
    recall = np.divide(matched, expected, out=zeros.copy(), where=present).sum(axis=-1) / orders
    weighted = beta_squared * precision + recall
    product = (1 + beta_squared) * precision * recall
    return np.asarray(100 * np.divide(product, weighted, out=np.zeros_like(weighted), where=weighted > 0))


def _bleu_metric(references: Sequence[str]) -> Any:
    """Return sacrebleu's BLEU with the tokenisation that suits the references."""
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="char" if _unspaced(references) else "13a")


def _chrf_metric() -> Any:
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
