"""Metrics of given labels: accuracy, precision, recall, F1, MCC and the confusion matrix; F1 is scikit-learn's.

The statistics take indicators, [n, L] with 1 where a row has a label: one label per row and several are the same to
them. Figures are shares in 0..1, MCC is in -1..1.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, Sums, mean_sums, ratio, ratio_sums

__all__ = [
    "accuracy",
    "confusion_matrix",
    "exact_set_sums",
    "f1",
    "f1_sums",
    "label_f1_sums",
    "macro_f1_sums",
    "mcc_sums",
    "micro_f1_sums",
    "one_hot",
    "precision_sums",
    "recall_sums",
]


def one_hot(names: Sequence[str], labels: Sequence[str]) -> Array:
    """Return [n, L] indicators of one label per row."""
    place = {label: index for index, label in enumerate(labels)}
    return np.eye(len(labels))[[place[name] for name in names]]


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


def f1_sums(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Sums:
    """Macro F1 of one label per row."""
    return macro_f1_sums(one_hot(answers, labels), one_hot(references, labels))


def macro_f1_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Macro F1 from true positives, answered and expected per label: mean of 2 TP / (answered + expected).

    A label absent from a resample, in answers and references alike, is left out of that resample's mean.

    Args:
        given: [n, L] indicators of the answers.
        expected: [n, L] indicators of the references.
    """
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    count = own.shape[1]

    def score(sums: Array) -> Array:
        hits, sizes = sums[..., :count], sums[..., count:]
        return ratio(ratio(2 * hits, sizes, 0.0).sum(axis=-1), (sizes > 0).sum(axis=-1), np.nan)

    return Sums(np.concatenate([own * wanted, own + wanted], axis=1), score)


def micro_f1_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Micro F1, 2 TP / (answered + expected) summed over [n, L] labels; equals accuracy with one label per row."""
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    return ratio_sums(2 * (own * wanted).sum(axis=1), (own + wanted).sum(axis=1))


def exact_set_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Subset accuracy of [n, L] indicators: the share of rows with exactly the labels expected."""
    return mean_sums((np.asarray(given) == np.asarray(expected)).all(axis=1))


def precision_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Precision of one label from [n] indicators, TP / answered; 0 for a label that is never answered."""
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    return ratio_sums(own * wanted, own, undefined=0.0)


def recall_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Recall of one label from [n] indicators, TP / expected; not defined for a label without rows."""
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    return ratio_sums(own * wanted, wanted)


def label_f1_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """F1 of one label from [n] indicators, 2 TP / (answered + expected); not defined where both are 0."""
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    return ratio_sums(2 * own * wanted, own + wanted)


def mcc_sums(given: npt.ArrayLike, expected: npt.ArrayLike) -> Sums:
    """Matthews correlation of one label per row, for any number of labels: R_K of Gorodkin 2004.

    (c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)) with s rows, c right, p_k answered and t_k expected
    of label k; 0 where all answers or all references are one label, as in scikit-learn.

    Args:
        given: [n, L] indicators of the answers.
        expected: [n, L] indicators of the references.
    """
    own, wanted = np.asarray(given, float), np.asarray(expected, float)
    count = own.shape[1]

    def score(sums: Array) -> Array:
        right, p, t = sums[..., 0], sums[..., 1 : 1 + count], sums[..., 1 + count :]
        rows = p.sum(axis=-1)
        spread = (rows**2 - (p**2).sum(axis=-1)) * (rows**2 - (t**2).sum(axis=-1))
        return ratio(right * rows - (p * t).sum(axis=-1), np.sqrt(spread), 0.0)

    return Sums(np.concatenate([(own * wanted).sum(axis=1, keepdims=True), own, wanted], axis=1), score)


def confusion_matrix(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Count rows by reference (down) and answer (across), in the order of `labels`."""
    place = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for answer, reference in zip(answers, references, strict=True):
        counts[place[reference], place[answer]] += 1
    return tuple(tuple(int(count) for count in row) for row in counts)
