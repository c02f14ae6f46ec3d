"""Metrics of chosen labels: accuracy, F1 and the confusion matrix, as shares in 0..1; F1 is scikit-learn's."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from haori.metrics.statistics import Array, Sums

__all__ = ["accuracy", "confusion_matrix", "f1", "f1_sums"]


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


def confusion_matrix(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Count rows by reference (down) and answer (across), in the order of `labels`."""
    place = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    for answer, reference in zip(answers, references, strict=True):
        counts[place[reference], place[answer]] += 1
    return tuple(tuple(int(count) for count in row) for row in counts)
