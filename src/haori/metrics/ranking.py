"""AUROC and average precision: how well scores put the rows with a label above those without it.

Both depend on the order of scores alone, so each label is sorted once and a resample is a cumulative sum of how often
each row was drawn. Rows of equal score stand together: as half right for AUROC (midranks), as one threshold for
average precision, as in scikit-learn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, ratio

__all__ = ["Ranked", "auroc", "average_precision"]


class _Order(NamedTuple):
    """The rows of one label by falling score.

    Attributes:
        rows: [n] row at each rank.
        positives: [P] ranks of the rows that have the label.
        starts: [P] first rank of the rows with the score of each of them.
        ends: [P] rank after the last of those.
        positive_ends: [P] how many rows that have the label lie before that end.
    """

    rows: npt.NDArray[np.intp]
    positives: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    ends: npt.NDArray[np.intp]
    positive_ends: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Ranked:
    """The mean of a ranking metric over labels; a label on which it is not defined is left out of the mean.

    Attributes:
        rows: Number of rows.
        orders: Order of the rows for each label.
        score: (times drawn [n, r] by rank, the label's order) -> [r] metric of that label, NaN where not defined.
    """

    rows: int
    orders: tuple[_Order, ...]
    score: Callable[[Array, _Order], Array]

    @property
    def value(self) -> float:
        """Return the metric over all rows; NaN where it is defined for no label."""
        return float(self.resampled(np.ones((1, self.rows)))[0])

    def resampled(self, counts: Array) -> Array:
        """Return [r], the metric of each resample."""
        by_row = np.ascontiguousarray(counts.T)  # [n, r]: a row's counts lie together and are moved together
        total, defined = np.zeros(len(counts)), np.zeros(len(counts))
        for order in self.orders:
            found = self.score(by_row[order.rows], order)
            known = ~np.isnan(found)
            total += np.where(known, found, 0.0)
            defined += known
        return np.where(defined > 0, total / np.maximum(1, defined), np.nan)


def auroc(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Ranked:
    """Area under the ROC curve, macro over labels (Hanley and McNeil 1982).

    Of all pairs of a row with the label and one without, the share in the right order, a tie counting half; it is not
    defined for a label that all rows have or none.

    Args:
        scores: [n] or [n, L], higher for rows that have the label.
        targets: [n] or [n, L], whether the row has it.
    """
    return _ranked(scores, targets, _auroc)


def average_precision(scores: npt.ArrayLike, targets: npt.ArrayLike) -> Ranked:
    """Average precision, macro over labels: the sum over thresholds of (rise of recall) x precision.

    It summarises the precision-recall curve (AUPR) without interpolation and is not defined for a label without rows.

    Args:
        scores: [n] or [n, L], higher for rows that have the label.
        targets: [n] or [n, L], whether the row has it.
    """
    return _ranked(scores, targets, _average_precision)


def _ranked(scores: npt.ArrayLike, targets: npt.ArrayLike, score: Callable[[Array, _Order], Array]) -> Ranked:
    values, has = np.asarray(scores, float), np.asarray(targets, bool)
    values, has = values.reshape(len(values), -1), has.reshape(len(has), -1)  # [n, L]
    orders = tuple(_order(values[:, label], has[:, label]) for label in range(values.shape[1]))
    return Ranked(len(values), orders, score)


def _order(scores: Array, has: npt.NDArray[np.bool_]) -> _Order:
    rows = np.argsort(-scores, kind="stable")
    falls = np.flatnonzero(np.diff(scores[rows])) + 1
    edges = np.concatenate([[0], falls, [len(rows)]])  # ends of the groups of equal score
    positives = np.flatnonzero(has[rows])
    group = np.searchsorted(edges, positives, side="right")
    ends = edges[group]
    return _Order(rows, positives, edges[group - 1], ends, np.searchsorted(positives, ends))


def _auroc(drawn: Array, order: _Order) -> Array:
    """Return (sum of midranks of positives - P^2 / 2) / (P N), with P and N the positives and negatives drawn."""
    before = _before(drawn)  # [n + 1, r]
    own = drawn[order.positives]  # [P, r]
    positives, total = own.sum(axis=0), before[-1]
    below = total - (before[order.starts] + before[order.ends]) / 2  # [P, r] rows below, and half of those equal
    pairs = positives * (total - positives)
    right = np.einsum("pr,pr->r", own, below) - positives**2 / 2  # pairs of two positives are not counted
    return ratio(right, pairs, np.nan)


def _average_precision(drawn: Array, order: _Order) -> Array:
    """Return the sum over positives of precision at their threshold, divided by the number of positives drawn."""
    own = drawn[order.positives]  # [P, r]
    above = _before(drawn)[order.ends]  # [P, r] rows at or above the threshold
    right = _before(own)[order.positive_ends]  # [P, r] positives among them
    precision = ratio(right, above, 0.0)
    return ratio(np.einsum("pr,pr->r", own, precision), own.sum(axis=0), np.nan)


def _before(drawn: Array) -> Array:
    """Return [n + 1, r]: how many draws come before each rank."""
    sums = np.zeros((len(drawn) + 1, drawn.shape[1]))
    np.cumsum(drawn, axis=0, out=sums[1:])
    return sums
