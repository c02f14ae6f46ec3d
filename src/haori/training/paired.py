"""Whether a loss has changed by more than its noise, told by the same things measured twice.

Losses of different pictures differ far more than training changes any of them, so means are compared picture by
picture: of the differences d_i of n pictures the mean, and its standard error s / sqrt(n) with s their standard
deviation. A rise or fall counts where it exceeds its noise: the standard error times the 95% quantile of Student's t
with n - 1 degrees of freedom (a one-sided paired t-test). One picture has no standard error, and nothing can be told.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Change", "change"]

# By degrees of freedom from 1; beyond, that of the normal distribution with its first correction, (z^3 + z) / (4 n).
_QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
_NORMAL = 1.6449


class Change(NamedTuple):
    """The mean change of a loss.

    Attributes:
        mean: After less before.
        error: Its standard error.
        things: How many were measured twice.
    """

    mean: float
    error: float
    things: int

    @property
    def noise(self) -> float:
        """Return what a change must exceed to count."""
        freedom = self.things - 1
        if freedom <= len(_QUANTILES):
            return self.error * _QUANTILES[freedom - 1]
        return self.error * (_NORMAL + (_NORMAL**3 + _NORMAL) / (4 * freedom))

    @property
    def is_rise(self) -> bool:
        """Say whether the loss rose by more than its noise."""
        return self.mean > self.noise

    @property
    def is_fall(self) -> bool:
        """Say whether the loss fell by more than its noise."""
        return -self.mean > self.noise

    def __str__(self) -> str:
        """Return the change with its standard error."""
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """Return the change between two measurements of the same things; None where fewer than two were measured."""
    count = len(before)
    if count < 2 or count != len(after):
        return None
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return Change(mean, math.sqrt(variance / count), count)
