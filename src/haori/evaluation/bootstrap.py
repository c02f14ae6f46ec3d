"""Uncertainty: percentile bootstrap over rows, paired differences, and McNemar's exact test.

Rows are the units that are drawn again; the rows of a difference are drawn together, so what is hard for both
systems cancels. Assumes that rows are independent of one another.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array, Sums

__all__ = ["RESAMPLES", "Interval", "Intervals", "McNemar", "intervals", "mcnemar"]

RESAMPLES = 2000
_LEVELS = (2.5, 97.5)
_CHUNK = 2_000_000  # row draws held at once


class Interval(NamedTuple):
    """The ends of a 95% interval."""

    low: float
    high: float


class Intervals(NamedTuple):
    """95% intervals of a metric, of the base's, and of their paired difference (value - base)."""

    value: Interval
    base: Interval | None
    difference: Interval | None


class McNemar(NamedTuple):
    """Rows that exactly one of two systems got right, and the two-sided exact p-value."""

    only_first: int
    only_second: int
    p_value: float


def intervals(sums: Sums, base: Sums | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> Intervals | None:
    """Bootstrap a metric and, with `base`, the paired difference on the same resampled rows.

    The ends are the 2.5th and 97.5th percentiles over `resamples` draws of n rows with replacement
    (Efron 1979).

    Returns:
        None for fewer than two rows: there is nothing to draw from.
    """
    n = len(sums.rows)
    if n < 2:
        return None
    both = sums.rows if base is None else np.concatenate([sums.rows, base.rows], axis=1)  # [n, K] or [n, 2K]
    drawn = np.concatenate([counts @ both for counts in _draws(n, resamples, seed)])  # [resamples, K or 2K]
    width = sums.rows.shape[1]
    values = sums.score(drawn[:, :width])
    if base is None:
        return Intervals(_percentiles(values), None, None)
    base_values = base.score(drawn[:, width:])
    with np.errstate(invalid="ignore"):
        differences = values - base_values
    return Intervals(_percentiles(values), _percentiles(base_values), _percentiles(differences))


def mcnemar(first_right: npt.ArrayLike, second_right: npt.ArrayLike) -> McNemar:
    """Test whether two systems are right equally often on the same rows (McNemar 1947, exact binomial).

    With b and c the rows that only one got right: p = min(1, 2 P(X <= min(b, c))), X ~ Binomial(b + c, 1/2).
    """
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    n = b + c
    log_half = n * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - log_half)
        for k in range(min(b, c) + 1)
    )
    return McNemar(b, c, min(1.0, 2 * tail))


def _draws(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield [r, n] how often each row was drawn, in chunks that fit in memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        picks = generator.integers(0, n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(picks.ravel(), minlength=r * n).reshape(r, n).astype(float)


def _percentiles(values: Array) -> Interval:
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(values, _LEVELS)
    return Interval(float(low), float(high))
