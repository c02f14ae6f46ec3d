"""Each metric as a statistic over rows, so that a bootstrap draws rows again without a second look at them.

A resample is told by how often each row was drawn. Most metrics are functions of column sums (`Sums`); those that
rank rows are in `ranking`. With every row drawn once a statistic is the plain metric.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Mean", "Statistic", "Sums", "mean_of", "mean_sums", "ratio", "ratio_sums"]

Array = npt.NDArray[np.float64]


class Statistic(Protocol):
    """A metric as a function of how often each of its rows is drawn."""

    @property
    def rows(self) -> int:
        """Return the number of rows, n."""

    @property
    def value(self) -> float:
        """Return the metric over all rows; NaN where it is not defined on them."""

    def resampled(self, counts: Array) -> Array:
        """Return [r], the metric of r resamples; NaN where it is not defined on one.

        Args:
            counts: [r, n] how often each row was drawn, whole numbers from 0.
        """


@dataclass(frozen=True)
class Sums:
    """A metric of column sums.

    Attributes:
        terms: [n, K] numbers per row.
        score: [..., K] sums -> [...] metric.
    """

    terms: Array
    score: Callable[[Array], Array]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.terms)

    @property
    def value(self) -> float:
        """Return the metric over all rows."""
        return float(self.score(self.terms.sum(axis=0)))

    def resampled(self, counts: Array) -> Array:
        """Return [r], the metric of each resample."""
        return self.score(counts @ self.terms)


@dataclass(frozen=True)
class Mean:
    """The mean of one metric of several systems on the same rows."""

    parts: tuple[Statistic, ...]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return self.parts[0].rows

    @property
    def value(self) -> float:
        """Return the mean of the systems' values."""
        return float(np.mean([part.value for part in self.parts]))

    def resampled(self, counts: Array) -> Array:
        """Return [r], the mean over systems on each resample, which all of them share."""
        return np.asarray(np.mean([part.resampled(counts) for part in self.parts], axis=0))


def mean_of(parts: Sequence[Statistic]) -> Statistic:
    """The mean of one metric of several systems on the same rows, such as one method trained with several seeds."""
    return Mean(tuple(parts))


def mean_sums(values: npt.ArrayLike) -> Sums:
    """A mean over rows: accuracy from right or wrong, exact match from equal or not."""
    column = np.asarray(values, float)
    return Sums(np.stack([column, np.ones_like(column)], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def ratio_sums(numerators: npt.ArrayLike, denominators: npt.ArrayLike, *, undefined: float = np.nan) -> Sums:
    """A ratio of sums over rows, such as right tokens / tokens; `undefined` where the denominators sum to 0."""
    terms = np.stack([np.asarray(numerators, float), np.asarray(denominators, float)], axis=1)
    return Sums(terms, lambda sums: ratio(sums[..., 0], sums[..., 1], undefined))


def ratio(numerators: Array, denominators: Array, otherwise: float) -> Array:
    """Return the elementwise ratio, and `otherwise` where a denominator is 0."""
    empty = np.full(np.broadcast_shapes(np.shape(numerators), np.shape(denominators)), otherwise)
    return np.asarray(np.divide(numerators, denominators, out=empty, where=np.not_equal(denominators, 0)))
