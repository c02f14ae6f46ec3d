"""Each metric as a function of sums over rows, so that a bootstrap needs no second look at the rows.

`rows` has one line of numbers per row of data; `score` maps their column sums, over any leading axes, to the
metric. With all rows summed once it equals the plain metric of `metrics.py` (a test holds them together).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from haori.evaluation.metrics import bleu_metric, chrf_metric

__all__ = [
    "Array",
    "Sums",
    "bleu_sums",
    "chrf_sums",
    "f1_sums",
    "loss_sums",
    "mean_of",
    "mean_sums",
    "perplexity_sums",
]

Array = npt.NDArray[np.float64]
_ORDERS = 4  # BLEU's n-gram orders


@dataclass(frozen=True)
class Sums:
    """A metric in summable form.

    Attributes:
        rows: [n, K] numbers per row.
        score: [..., K] sums -> [...] metric.
    """

    rows: Array
    score: Callable[[Array], Array]

    @property
    def value(self) -> float:
        """Return the metric over all rows."""
        return float(self.score(self.rows.sum(axis=0)))


def perplexity_sums(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> Sums:
    """Perplexity from (NLL, tokens) per row: exp(sum NLL / sum tokens)."""

    def score(sums: Array) -> Array:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))

    return Sums(np.stack([np.asarray(nll, float), np.asarray(tokens, float)], axis=1), score)


def loss_sums(nll: npt.ArrayLike, tokens: npt.ArrayLike) -> Sums:
    """Loss in nats per token from (NLL, tokens) per row: sum NLL / sum tokens."""
    rows = np.stack([np.asarray(nll, float), np.asarray(tokens, float)], axis=1)

    def score(sums: Array) -> Array:
        return np.asarray(
            np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] > 0)
        )

    return Sums(rows, score)


def mean_of(parts: Sequence[Sums]) -> Sums:
    """The mean of one metric of several systems on the same rows, such as one method trained with several seeds."""
    widths = [part.rows.shape[1] for part in parts]
    ends = np.cumsum(widths)

    def score(sums: Array) -> Array:
        split = (sums[..., end - width : end] for end, width in zip(ends, widths, strict=True))
        return np.asarray(np.mean([part.score(own) for part, own in zip(parts, split, strict=True)], axis=0))

    return Sums(np.concatenate([part.rows for part in parts], axis=1), score)


def mean_sums(values: npt.ArrayLike) -> Sums:
    """A mean over rows: accuracy from right or wrong, exact match from equal or not."""
    column = np.asarray(values, float)
    return Sums(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def f1_sums(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Sums:
    """Macro F1 from true positives, answered and expected per label: mean of 2 TP / (answered + expected).

    A label absent from a resample, in answers and references alike, is left out of that resample's mean.
    """
    count = len(labels)
    place = {label: index for index, label in enumerate(labels)}
    identity = np.eye(count)
    given = identity[[place[answer] for answer in answers]]  # [n, L]
    expected = identity[[place[reference] for reference in references]]  # [n, L]

    def score(sums: Array) -> Array:
        hits, sizes = sums[..., :count], sums[..., count:]
        present = sizes > 0
        values = np.divide(2 * hits, sizes, out=np.zeros_like(hits), where=present)
        return np.asarray(values.sum(axis=-1) / np.maximum(1, present.sum(axis=-1)))

    return Sums(np.concatenate([given * expected, given + expected], axis=1), score)


def bleu_sums(answers: Sequence[str], references: Sequence[str]) -> Sums:
    """Corpus BLEU from answer length, reference length, matches and totals of each n-gram order."""
    rows = bleu_metric(references)._extract_corpus_statistics([*answers], [[*references]])
    return Sums(np.asarray(rows, float), _bleu_score)


def chrf_sums(answers: Sequence[str], references: Sequence[str]) -> Sums:
    """Corpus chrF from (answer, reference, matched) counts of each character n-gram order."""
    metric = chrf_metric()
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
