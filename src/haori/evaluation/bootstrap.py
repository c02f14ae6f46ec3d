"""Uncertainty: percentile bootstrap over rows, paired differences, and McNemar's exact test.

Rows are the units that are drawn again; the rows of a difference are drawn together, so what is hard for both
systems cancels. Rows that belong together, such as pictures of one prompt, are told by their groups: groups are drawn
again, and within each its rows. Without groups rows are taken to be independent of one another.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from haori.core.records import Metric
from haori.metrics.statistics import Array, Statistic

__all__ = ["RESAMPLES", "Interval", "Intervals", "McNemar", "as_metric", "draws", "intervals", "mcnemar"]

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


def intervals(
    statistic: Statistic,
    base: Statistic | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> Intervals | None:
    """Bootstrap a metric and, with `base`, the paired difference on the same resampled rows.

    The ends are the 2.5th and 97.5th percentiles over `resamples` draws of n rows with replacement
    (Efron 1979). Draws on which the metric is not defined, such as AUROC of one class, are left out.

    Args:
        statistic: The metric.
        base: The same of the base, on the same rows.
        resamples: How many draws.
        seed: Of the draws.
        groups: [n] number of the group of each row; groups are drawn first, then as many rows of each as it has
            (Davison and Hinkley 1997, section 3.8).

    Returns:
        None for fewer than two rows, or where the metric is defined on no draw: there is nothing to draw from.

    Raises:
        ValueError: The two were measured on different numbers of rows.
    """
    n = statistic.rows
    if base is not None and base.rows != n:
        raise ValueError(f"a paired difference needs the same rows, not {n} and {base.rows}")
    if n < 2:
        return None
    both = (statistic,) if base is None else (statistic, base)
    chunks = draws(n, resamples, seed) if groups is None else _group_draws(groups, resamples, seed)
    drawn = np.concatenate([[one.resampled(c) for one in both] for c in chunks], axis=1)  # [1 or 2, resamples]
    drawn = drawn[:, ~np.isnan(drawn).any(axis=0)]
    if not drawn.size:
        return None
    value = _percentiles(drawn[0])
    if base is None:
        return Intervals(value, None, None)
    with np.errstate(invalid="ignore"):
        differences = drawn[0] - drawn[1]
    return Intervals(value, _percentiles(drawn[1]), _percentiles(differences))


def as_metric(value: float, base: float | None, found: Intervals | None) -> Metric:
    """Return the record of a metric, of the base's where it was compared, and of what `intervals` found."""
    low, high = found.value if found else (None, None)
    difference_low, difference_high = found.difference if found and found.difference else (None, None)
    return Metric(
        value=value,
        low=low,
        high=high,
        base=base,
        difference=None if base is None else value - base,
        difference_low=difference_low,
        difference_high=difference_high,
    )


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


def draws(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield [r, n] how often each row was drawn, in chunks that fit in memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        picks = generator.integers(0, n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(picks.ravel(), minlength=r * n).reshape(r, n).astype(float)


def _group_draws(groups: Sequence[int], resamples: int, seed: int) -> Iterator[Array]:
    """Yield [r, n] how often each row was drawn, where groups are drawn and then rows within them."""
    numbers = np.asarray(groups)
    members = [np.flatnonzero(numbers == group) for group in np.unique(numbers)]
    sizes = np.array([len(rows) for rows in members])
    table = np.stack([np.resize(rows, sizes.max()) for rows in members])  # [groups, largest]
    generator, n = np.random.default_rng(seed), len(numbers)
    at_once = max(1, _CHUNK // (len(members) * int(sizes.max())))
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        drawn = generator.integers(0, len(members), size=(r, len(members)))
        places = (generator.random((r, len(members), sizes.max())) * sizes[drawn][..., None]).astype(int)
        rows = np.take_along_axis(table[drawn], places, axis=2) + n * np.arange(r)[:, None, None]
        kept = np.arange(sizes.max()) < sizes[drawn][..., None]
        yield np.bincount(rows[kept], minlength=r * n).reshape(r, n).astype(float)


def _percentiles(values: Array) -> Interval:
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(values, _LEVELS)
    return Interval(float(low), float(high))
