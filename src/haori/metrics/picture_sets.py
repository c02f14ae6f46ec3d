"""Distances between sets of pictures by their features (KID, FID), and the Inception Score by their classes.

All in float64. The names are those of the papers; what network the features come from must be said beside a figure,
since only figures of one network compare.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from haori.core.errors import InputError
from haori.metrics.pictures import kernel_inception_distance, polynomial_kernel
from haori.metrics.statistics import Array, Sums

__all__ = [
    "FEWEST_FOR_FID",
    "KernelDistance",
    "PairMean",
    "SubsetKid",
    "frechet_distance",
    "inception_score",
    "kid_over_subsets",
]

FEWEST_FOR_FID = 2048
"""Pictures a side below which a Frechet distance says more about their number than about them."""

_SUBSETS = 100
_SUBSET_SIZE = 1000


class SubsetKid(NamedTuple):
    """KID over random subsets: its mean and standard deviation, and how many pictures each subset had."""

    mean: float
    spread: float
    size: int


def kid_over_subsets(
    generated: npt.ArrayLike, real: npt.ArrayLike, *, subsets: int = _SUBSETS, size: int | None = None, seed: int = 0
) -> SubsetKid:
    """Return KID as it is usually given: over 100 subsets of 1,000, drawn without replacement from both sets.

    Subsets of fewer than 2,000 pictures have half of the smaller set, so that they differ.
    Source: Binkowski et al. (ICLR 2018), section 4; subsets as in torch-fidelity.

    Args:
        generated: [n, d] features.
        real: [m, d] features.
        subsets: How many.
        size: Pictures of each.
        seed: Of the subsets.

    Raises:
        InputError: A set has fewer than four pictures, or than a subset.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    fewest = min(len(x), len(y))
    wanted = min(_SUBSET_SIZE, fewest // 2) if size is None else size
    if not 2 <= wanted <= fewest:
        raise InputError(f"KID over subsets needs two pictures a subset and four a set; there are {fewest}.")
    draw = np.random.default_rng(seed)
    found = [
        kernel_inception_distance(x[draw.choice(len(x), wanted, False)], y[draw.choice(len(y), wanted, False)])
        for _ in range(subsets)
    ]
    return SubsetKid(float(np.mean(found)), float(np.std(found)), wanted)


def frechet_distance(generated: npt.ArrayLike, real: npt.ArrayLike, *, force: bool = False) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features; FID with those of Inception.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017).

    Args:
        generated: [n, d] features.
        real: [m, d] features.
        force: Compute it for fewer than 2,048 pictures too.

    Raises:
        InputError: There are fewer.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    fewest = min(len(x), len(y))
    if fewest < (2 if force else FEWEST_FOR_FID):
        raise InputError(
            f"FID needs {FEWEST_FOR_FID:,} pictures on each side and there are {fewest:,}: with fewer it is too high "
            "by more than what pictures differ, since a covariance cannot be told from them. KID has no such bias."
        )
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # (C1 C2)^(1/2) and (C1^(1/2) C2 C1^(1/2))^(1/2) have the same eigenvalues, and the second is symmetric.
    common = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    apart = x.mean(0) - y.mean(0)
    return float(apart @ apart + np.trace(first) + np.trace(second) - 2 * common)


def inception_score(classes: npt.ArrayLike) -> Sums:
    """Return exp(E KL(p(y|x) || p(y))) as a statistic over pictures; an Inception Score only with Inception's classes.

    Source: Salimans et al., "Improved Techniques for Training GANs" (NeurIPS 2016). Over all pictures, not ten parts.

    Args:
        classes: [n, k] probabilities.
    """
    given = np.asarray(classes, dtype=np.float64)
    own = _entropy_sum(given)[:, None]
    terms = np.concatenate([np.ones_like(own), own, given], axis=1)

    def score(sums: Array) -> Array:
        count = sums[..., :1]
        shares = sums[..., 2:] / count
        return np.asarray(np.exp(sums[..., 1] / count[..., 0] - _entropy_sum(shares)))

    return Sums(terms, score)


def _entropy_sum(shares: Array) -> Array:
    """Return [...] sums of p log p over the last axis."""
    return np.asarray((shares * np.log(shares.clip(1e-300))).sum(-1))


@dataclass(frozen=True)
class PairMean:
    """The mean of a number over pairs of different rows.

    A row that is drawn twice makes no pair with itself, so that a resample is as unbiased as the whole.

    Attributes:
        values: [n, n] number of each pair, symmetric.
        counted: [n, n] whether a pair counts; its diagonal is False.
    """

    values: Array
    counted: npt.NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    @property
    def value(self) -> float:
        """Return the mean; NaN where no pair counts."""
        return float(self.resampled(np.ones((1, self.rows)))[0])

    def resampled(self, counts: Array) -> Array:
        """Return [r], the mean of each resample."""
        pairs = self.counted.astype(float)
        sums = ((counts @ np.where(self.counted, self.values, 0.0)) * counts).sum(1)
        numbers = ((counts @ pairs) * counts).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(numbers > 0, sums / numbers, np.nan))


class KernelDistance:
    """KID between pictures that are drawn again and real ones that stay; see `kernel_inception_distance`.

    Args:
        generated: [n, d] features.
        real: [m, d] features, m of at least 2.
    """

    def __init__(self, generated: npt.ArrayLike, real: npt.ArrayLike) -> None:
        x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
        within = polynomial_kernel(y, y)
        self._own = PairMean(polynomial_kernel(x, x), ~np.eye(len(x), dtype=bool))
        self._real = float((within.sum() - np.trace(within)) / (len(y) * (len(y) - 1)))
        self._across = polynomial_kernel(x, y).mean(1)

    @property
    def rows(self) -> int:
        """Return the number of pictures that are drawn again."""
        return self._own.rows

    @property
    def value(self) -> float:
        """Return the KID."""
        return float(self.resampled(np.ones((1, self.rows)))[0])

    def resampled(self, counts: Array) -> Array:
        """Return [r], the KID of each resample."""
        across = counts @ self._across / counts.sum(1)
        return np.asarray(self._own.resampled(counts) + self._real - 2 * across)
