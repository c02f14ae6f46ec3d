"""All metrics of a classifier from its probabilities: one label per row, several labels per row, labelled tokens.

What is not defined on the rows (AUROC where all have one label) is left out, with a sentence that says so.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from haori.core.errors import DataError, InputError, VerificationError, nearest
from haori.metrics.calibration import CALIBRATION_BINS, calibration_sums, log_loss_sums
from haori.metrics.entities import entity_statistics, is_bio, token_accuracy
from haori.metrics.kinds import KINDS, label_metric
from haori.metrics.labels import (
    confusion_matrix,
    exact_set_sums,
    label_f1_sums,
    macro_f1_sums,
    mcc_sums,
    micro_f1_sums,
    one_hot,
    precision_sums,
    recall_sums,
)
from haori.metrics.ranking import auroc, average_precision
from haori.metrics.statistics import Array, Statistic, mean_sums

__all__ = [
    "THRESHOLD",
    "ClassificationMetrics",
    "labels_above",
    "multi_label_metrics",
    "single_label_metrics",
    "token_metrics",
    "top_labels",
]

THRESHOLD = 0.5
_SUM_TOLERANCE = 1e-3  # a softmax in float32 over thousands of labels is within it; percentages and logits are not


class ClassificationMetrics(NamedTuple):
    """What was measured.

    Attributes:
        statistics: Each metric that is defined, by its name in `kinds.KINDS`.
        by_label: Precision, recall and F1 of each label, by `kinds.label_metric`.
        confusion: Rows by reference and answer, where a row has one label.
        notes: How figures are defined and which are not, as sentences.
    """

    statistics: dict[str, Statistic]
    by_label: dict[str, Statistic]
    confusion: tuple[tuple[int, ...], ...] | None
    notes: tuple[str, ...]


def single_label_metrics(
    probabilities: npt.ArrayLike, references: Sequence[str], labels: Sequence[str]
) -> ClassificationMetrics:
    """Measure a classifier that gives each row one of the labels.

    Args:
        probabilities: [n, L] of each label, each row's sum 1.
        references: [n] the label of each row.
        labels: [L] the labels, in the order of the columns. Of two, the second is the positive one.

    Raises:
        VerificationError: A probability is not a finite number.
        InputError: A row of probabilities does not sum to 1, or there is no row.
        DataError: A row has a label that is not among the labels.
    """
    p = _checked(probabilities, len(references), len(labels), sums_to_one=True)
    _require_known(((reference,) for reference in references), labels)
    answers = top_labels(p, labels)
    given, expected = one_hot(answers, labels), one_hot(references, labels)  # [n, L]
    binary = len(labels) == 2
    scores, targets = (p[:, 1], expected[:, 1]) if binary else (p, expected)
    right = np.array([answer == reference for answer, reference in zip(answers, references, strict=True)])
    statistics: dict[str, Statistic] = {
        "accuracy": mean_sums(right),
        "macro_f1": macro_f1_sums(given, expected),
        "micro_f1": micro_f1_sums(given, expected),
        "mcc": mcc_sums(given, expected),
        "auroc": auroc(scores, targets),
        "aupr": average_precision(scores, targets),
        "calibration_error": calibration_sums(p.max(axis=1), right),
        "log_loss": log_loss_sums((p * expected).sum(axis=1)),
    }
    ranked = f"with {labels[1]!r} as the positive label" if binary else "each label against the rest, mean over labels"
    defined, missing = _defined(statistics)
    notes = (
        "The answer is the label of the highest probability. Macro F1 is the mean over labels; with one label per row "
        "micro F1 equals accuracy.",
        f"AUROC and AUPR (average precision) are {ranked}.",
        _calibration_note("the highest probability of a row"),
        *missing,
    )
    by_label = _by_label(given, expected, labels)
    return ClassificationMetrics(defined, by_label, confusion_matrix(answers, references, labels), notes)


def multi_label_metrics(
    probabilities: npt.ArrayLike, references: Sequence[Collection[str]], labels: Sequence[str]
) -> ClassificationMetrics:
    """Measure a classifier that gives each row any of the labels, those of a probability of at least 0.5.

    Args:
        probabilities: [n, L] of each label, independent of one another.
        references: [n] the labels of each row, which may be none.
        labels: [L] the labels, in the order of the columns.

    Raises:
        VerificationError: A probability is not a finite number.
        InputError: A probability is not in 0..1, or there is no row.
        DataError: A row has a label that is not among the labels.
    """
    p = _checked(probabilities, len(references), len(labels), sums_to_one=False)
    _require_known(references, labels)
    expected = np.array([[label in reference for label in labels] for reference in references])  # [n, L]
    given = p >= THRESHOLD
    statistics: dict[str, Statistic] = {
        "exact_match": exact_set_sums(given, expected),
        "macro_f1": macro_f1_sums(given, expected),
        "micro_f1": micro_f1_sums(given, expected),
        "auroc": auroc(p, expected),
        "aupr": average_precision(p, expected),
        "calibration_error": calibration_sums(np.maximum(p, 1 - p), given == expected),
    }
    defined, missing = _defined(statistics)
    notes = (
        f"A row is given the labels of a probability of at least {THRESHOLD:g}. Exact match is the share of rows with "
        "exactly the labels expected. Macro F1, AUROC and AUPR (average precision) are means over labels.",
        _calibration_note("the probability of each decision for or against a label"),
        *missing,
    )
    return ClassificationMetrics(defined, _by_label(given, expected, labels), None, notes)


def token_metrics(
    answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]], labels: Sequence[str]
) -> ClassificationMetrics:
    """Measure labels of tokens; entities too where the labels are BIO (`B-TYPE`, `I-TYPE`, `O`).

    Args:
        answers: [n] labels given to the counted tokens of each row.
        references: [n] the labels that they should have.
        labels: The labels.

    Raises:
        InputError: There is no row, or no token.
        DataError: A token has a label that is not among the labels.
    """
    if not any(len(row) for row in references):
        raise InputError("There is no labelled token to measure; give at least one.")
    _require_known(references, labels)
    statistics: dict[str, Statistic] = {"token_accuracy": token_accuracy(answers, references)}
    notes: tuple[str, ...] = ()
    if is_bio(labels):
        statistics = entity_statistics(answers, references) | statistics
        notes = (
            "An entity is right if its type and both its ends are (CoNLL-2003). Labels are read strictly: an entity "
            "begins with B-, and an I- that continues nothing marks none. Figures are over the entities of all rows.",
        )
    defined, missing = _defined(statistics)
    return ClassificationMetrics(defined, {}, None, (*notes, *missing))


def top_labels(probabilities: npt.ArrayLike, labels: Sequence[str]) -> list[str]:
    """Return the label of the highest of each row's [n, L] probabilities; of equal ones the first."""
    return [labels[place] for place in np.asarray(probabilities).argmax(axis=1)]


def labels_above(probabilities: npt.ArrayLike, labels: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the labels of each row whose [n, L] probability is at least 0.5."""
    above = np.asarray(probabilities) >= THRESHOLD
    return [tuple(label for label, has in zip(labels, row, strict=True) if has) for row in above]


def _by_label(given: npt.ArrayLike, expected: npt.ArrayLike, labels: Sequence[str]) -> dict[str, Statistic]:
    found: dict[str, Statistic] = {}
    for label, own, its in zip(labels, np.transpose(given), np.transpose(expected), strict=True):
        found[label_metric("precision", label)] = precision_sums(own, its)
        found[label_metric("recall", label)] = recall_sums(own, its)
        found[label_metric("f1", label)] = label_f1_sums(own, its)
    return {name: statistic for name, statistic in found.items() if not np.isnan(statistic.value)}


def _defined(statistics: dict[str, Statistic]) -> tuple[dict[str, Statistic], list[str]]:
    """Return the metrics that are defined, and a sentence on those that are not."""
    defined = {name: statistic for name, statistic in statistics.items() if not np.isnan(statistic.value)}
    missing = [KINDS[name].title for name in statistics if name not in defined]
    if not missing:
        return defined, []
    return defined, [f"Not defined on these rows, and left out: {', '.join(missing)}."]


def _calibration_note(confidence: str) -> str:
    return (
        f"Calibration error is the expected calibration error over {CALIBRATION_BINS} bins of equal width of "
        f"{confidence} (Guo et al. 2017); lower is better."
    )


def _checked(probabilities: npt.ArrayLike, rows: int, labels: int, *, sums_to_one: bool) -> Array:
    """Return the probabilities as [n, L] float64 after checking them."""
    p = np.asarray(probabilities, float)
    if not rows:
        raise InputError("There is no row to measure; give at least one.")
    if p.shape != (rows, labels):
        raise ValueError(f"{rows} rows and {labels} labels need probabilities [{rows}, {labels}], not {[*p.shape]}")
    broken = int((~np.isfinite(p)).any(axis=1).sum())
    if broken:
        raise VerificationError(
            f"The model gives scores that are not numbers on {broken} of {rows} rows; its weights are broken (NaN or "
            "infinite), so train it again with a lower learning rate."
        )
    totals = p.sum(axis=1)
    if (p < 0).any() or (p > 1 + _SUM_TOLERANCE).any():
        raise InputError(f"The probabilities range from {p.min():g} to {p.max():g}, not from 0 to 1; give no logits.")
    worst = int(np.abs(totals - 1).argmax())
    if sums_to_one and abs(totals[worst] - 1) > _SUM_TOLERANCE:
        raise InputError(
            f"The probabilities of row {worst + 1} sum to {totals[worst]:g}, not to 1; give those of a softmax over "
            "the labels, or measure several labels per row."
        )
    return p


def _require_known(references: Iterable[Collection[str]], labels: Sequence[str]) -> None:
    known = set(labels)
    for row, names in enumerate(references, 1):
        for name in names:
            if name not in known:
                hint = nearest(name, labels) or f"its labels are {', '.join(map(repr, labels))}."
                raise DataError(f"Row {row} has the label {name!r}, which the model does not have; {hint}")
