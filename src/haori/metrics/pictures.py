"""How near generated pictures are to real ones, by their features (`picture_features`): retrieval, style and KID.

Neighbours are by cosine of features from which the mean of the reference pictures has been taken: all features share
one large direction, beside which what tells pictures apart would count little.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Retrieval",
    "centred_cosines",
    "kernel_inception_distance",
    "nearest_labels",
    "polynomial_kernel",
    "retrieval",
]

Array = npt.NDArray[np.float64]


class Retrieval(NamedTuple):
    """Shares of queries whose own label comes first, and among the first five, of all labels by their best picture."""

    first: float
    in_five: float


def nearest_labels(
    queries: npt.ArrayLike, references: npt.ArrayLike, labels: Sequence[str], *, count: int = 1
) -> list[list[str]]:
    """Return for each query the `count` labels nearest to it, the nearest first.

    A label is as near as its nearest reference picture, so each comes at most once.

    Args:
        queries: [n, d] features.
        references: [m, d] features.
        labels: [m] label of each reference.
        count: Labels to return; fewer where there are fewer.
    """
    near = centred_cosines(queries, references)
    nearest = []
    for row in near:
        ordered = dict.fromkeys(labels[place] for place in np.argsort(-row, kind="stable"))
        nearest.append(list(ordered)[:count])
    return nearest


def retrieval(
    queries: npt.ArrayLike, wanted: Sequence[str], references: npt.ArrayLike, labels: Sequence[str]
) -> Retrieval:
    """Measure how often the label wanted of a query is the nearest, and among the nearest five.

    Args:
        queries: [n, d] features of generated pictures.
        wanted: [n] label each should have.
        references: [m, d] features of real pictures.
        labels: [m] label of each.
    """
    found = nearest_labels(queries, references, labels, count=5)
    first = sum(near[0] == label for near, label in zip(found, wanted, strict=True))
    in_five = sum(label in near for near, label in zip(found, wanted, strict=True))
    return Retrieval(first / len(found), in_five / len(found))


def kernel_inception_distance(generated: npt.ArrayLike, real: npt.ArrayLike) -> float:
    """Return the KID of two sets of features: the unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Unbiased, so about 0 (below as well as above) for two samples of one distribution.
    Source: Binkowski et al., "Demystifying MMD GANs" (ICLR 2018), section 4.

    Args:
        generated: [n, d] features, n of at least 2.
        real: [m, d] features, m of at least 2.
    """
    x, y = np.asarray(generated, dtype=np.float64), np.asarray(real, dtype=np.float64)
    n, m = len(x), len(y)
    within_x, within_y = polynomial_kernel(x, x), polynomial_kernel(y, y)
    same_x = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    same_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(same_x + same_y - 2 * polynomial_kernel(x, y).mean())


def polynomial_kernel(x: npt.ArrayLike, y: npt.ArrayLike) -> Array:
    """Return [n, m] (x.y / d + 1)^3, the kernel of KID, for features [n, d] and [m, d]."""
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kernel: Array = (left @ right.T / left.shape[1] + 1) ** 3
    return kernel


def centred_cosines(queries: npt.ArrayLike, references: npt.ArrayLike, centre: npt.ArrayLike | None = None) -> Array:
    """Return [n, m] cosines of features after `centre` is taken from both.

    Args:
        queries: [n, d] features.
        references: [m, d] features.
        centre: [d]; None takes the mean of the references.
    """
    rows, columns = np.asarray(queries, dtype=np.float64), np.asarray(references, dtype=np.float64)
    middle = columns.mean(0) if centre is None else np.asarray(centre, dtype=np.float64)
    rows, columns = rows - middle, columns - middle
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12
    columns /= np.linalg.norm(columns, axis=1, keepdims=True) + 1e-12
    cosines: Array = rows @ columns.T
    return cosines
