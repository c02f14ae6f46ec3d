"""Strengths of systems from who beat whom: P(i beats j) = 1 / (1 + exp(s_j - s_i)).

Bradley and Terry (Biometrika 1952). The strengths that make what was seen most likely are finite and unique if and only
if each system can be reached from each other by a chain of wins (Ford, American Mathematical Monthly 1957): one that
won everything would be infinitely strong. A tie counts as half a win for both.

All functions take one table of wins or a stack of them, [..., K, K].
"""

import numpy as np
import numpy.typing as npt

from haori.metrics.statistics import Array

__all__ = ["bradley_terry", "has_strengths", "reachable"]

_MOST_STEPS = 500
_LONGEST = 1.0  # of a Newton step, in the logarithm of odds
_CLOSE = 1e-10


def reachable(wins: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return [..., K, K]: whether a chain of wins leads from one system to the other, or both are the same."""
    table = np.asarray(wins, dtype=float)
    systems = table.shape[-1]
    reach = (table > 0) | np.eye(systems, dtype=bool)
    for _ in range(max(1, systems - 1).bit_length()):  # each product doubles the length of the chains
        reach = (reach.astype(float) @ reach.astype(float)) > 0
    return reach


def has_strengths(wins: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Return [...]: whether finite strengths exist."""
    return np.asarray(reachable(wins).all(axis=(-2, -1)))


def bradley_terry(wins: npt.ArrayLike) -> Array:
    """Return [..., K], the maximum-likelihood strengths with mean 0, in the logarithm of odds.

    Newton's method on the concave log-likelihood sum_ij w_ij log P(i beats j), with steps of bounded length.

    Args:
        wins: [..., K, K] how often the system of the row beat that of the column; ties are 0.5 in both places.

    Raises:
        ValueError: For one of the tables `has_strengths` is false.
    """
    table = np.asarray(wins, dtype=float)
    if not has_strengths(table).all():
        raise ValueError("strengths are finite only where wins lead from each system to each other")
    systems = table.shape[-1]
    games = table + np.swapaxes(table, -1, -2)
    strengths = np.zeros(table.shape[:-1])
    for _ in range(_MOST_STEPS):
        chance = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))  # [..., K, K] row beats column
        gradient = (table - games * chance).sum(axis=-1)
        weight = games * chance * np.swapaxes(chance, -1, -2)
        curvature = np.eye(systems) * weight.sum(axis=-1)[..., None] - weight
        # Adding the same to all strengths changes nothing; this takes the direction out.
        step = np.linalg.solve(curvature + 1 / systems, gradient[..., None])[..., 0]
        longest = np.abs(step).max(axis=-1, keepdims=True)
        strengths = strengths + step * np.minimum(1.0, _LONGEST / np.maximum(longest, _LONGEST))
        if longest.max(initial=0.0) < _CLOSE:
            break
    return np.asarray(strengths - strengths.mean(axis=-1, keepdims=True))
