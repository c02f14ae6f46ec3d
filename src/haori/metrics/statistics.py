"""Each metric as a function of sums over rows, so that a bootstrap needs no second look at the rows.

`rows` has one line of numbers per row of data; `score` maps their column sums, over any leading axes, to the
metric. With all rows summed once it equals the plain metric (a test holds them together).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Sums", "mean_of", "mean_sums"]

Array = npt.NDArray[np.float64]


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
