"""A share of yes among so many answers, and how sure it is."""

import math
from typing import NamedTuple

__all__ = ["Share", "sign_test", "wilson"]

_Z = 1.959963984540054  # the standard normal's 97.5th percentile


class Share(NamedTuple):
    """A share with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(yes: int, n: int) -> Share | None:
    """Return yes / n with the score interval of Wilson (JASA 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n). Unlike
    p +- z sqrt(p (1 - p) / n) it stays within 0 and 1 and keeps its level for few answers.

    Returns:
        None without answers.
    """
    if n == 0:
        return None
    p, shrink = yes / n, 1 + _Z * _Z / n
    centre = (p + _Z * _Z / (2 * n)) / shrink
    half = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n)) / shrink
    # Exactly at the ends, where rounding would leave a trace.
    return Share(p, centre - half if yes else 0.0, centre + half if yes < n else 1.0)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided exact p-value that wins and losses are as likely (ties left out).

    p = min(1, 2 P(X <= min(wins, losses))), X ~ Binomial(wins + losses, 1/2).
    """
    n = wins + losses
    tail: int = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << n))
