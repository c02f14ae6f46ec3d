"""Strengths from wins: against a published fit, a general optimiser in float64, and the formula for two."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from haori.metrics.bradley_terry import bradley_terry, has_strengths
from haori.metrics.proportions import sign_test, wilson

# American League, eastern division, 1987: Agresti, "Categorical Data Analysis", table 10.10 (2nd edition).
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
BASEBALL = np.array([
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
])  # fmt: skip
# As the vignette of the R package BradleyTerry2 prints them, with Baltimore at 0.
PUBLISHED = (1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0)


def by_optimiser(wins: np.ndarray) -> np.ndarray:
    """The maximum of the log-likelihood, written out and given to a general optimiser."""

    def negative(strengths: np.ndarray) -> float:
        return float((wins * np.log1p(np.exp(strengths[None, :] - strengths[:, None]))).sum())

    found = minimize(lambda free: negative(np.append(free, 0.0)), np.zeros(len(wins) - 1), tol=1e-12).x
    full = np.append(found, 0.0)
    return full - full.mean()


def test_baseball_of_1987_is_as_published() -> None:
    found = bradley_terry(BASEBALL)
    assert found - found[-1] == pytest.approx(PUBLISHED, abs=6e-5)
    assert found.mean() == pytest.approx(0, abs=1e-12)


def test_tables_are_fitted_as_a_general_optimiser_does_alone_and_in_a_stack() -> None:
    chance = np.random.default_rng(1)
    tables = chance.integers(0, 6, size=(20, 4, 4)) + 0.5 * chance.integers(0, 2, size=(20, 4, 4))
    tables[:, range(4), range(4)] = 0
    tables = tables[has_strengths(tables)]
    assert len(tables) > 10
    stacked = bradley_terry(tables)
    for table, found in zip(tables, stacked, strict=True):
        assert found == pytest.approx(by_optimiser(table), abs=2e-5)
        assert found == pytest.approx(bradley_terry(table), abs=1e-9)


def test_two_systems_are_apart_by_the_logarithm_of_their_odds() -> None:
    for wins, losses in ((3, 1), (10_000, 1), (1, 4)):
        first, second = bradley_terry([[0, wins], [losses, 0]])
        assert first - second == pytest.approx(math.log(wins / losses), abs=1e-8)


def test_strengths_are_finite_only_where_wins_lead_from_each_to_each() -> None:
    assert has_strengths(BASEBALL)
    assert not has_strengths([[0, 3], [0, 0]])  # one won everything
    assert has_strengths([[0, 1, 0], [0, 0, 1], [1, 0, 0]])  # round in a circle
    chain = np.zeros((9, 9))
    chain[range(8), range(1, 9)] = 1
    assert not has_strengths(chain)
    chain[8, 0] = 1
    assert has_strengths(chain)
    with pytest.raises(ValueError, match="finite"):
        bradley_terry([[0, 3], [0, 0]])


def test_the_interval_of_a_share_is_wilsons() -> None:
    # The ends are where |p - share| = z sqrt(p (1 - p) / n): the score test put to the share itself.
    for yes, n in ((0, 10), (3, 10), (10, 10), (81, 263)):
        found = wilson(yes, n)
        assert found is not None and found.value == yes / n
        for end in (found.low, found.high):
            if 0 < end < 1:
                z = abs(yes / n - end) / math.sqrt(end * (1 - end) / n)
                assert z == pytest.approx(1.959964, abs=1e-5)
    # Newcombe (Statistics in Medicine 1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0, 0.1611), abs=5e-5)
    assert wilson(0, 0) is None
    for yes, n, fewer in ((12, 16, 12), (24, 36, 33), (60, 100, 95)):  # what docs/guide/rating.md says
        clear, unclear = wilson(yes, n), wilson(fewer * yes // n, fewer)
        assert clear is not None and unclear is not None and clear.low > 0.5 > unclear.low


def test_the_sign_test_is_scipys() -> None:
    from scipy.stats import binomtest

    for wins, losses in ((0, 0), (5, 5), (9, 1), (0, 7), (40, 22)):
        expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
