"""Intervals by bootstrap over rows, paired differences and McNemar's test."""

import numpy as np
import pytest

from haori.evaluation.bootstrap import intervals, mcnemar
from haori.metrics.likelihood import perplexity, perplexity_sums
from haori.metrics.statistics import mean_sums


def test_intervals_hold_the_value_and_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        right = generator.random(100) < 0.7
        found = intervals(mean_sums(right), resamples=300, seed=trial)
        assert found is not None
        assert found.value.low <= right.mean() <= found.value.high
        covered += found.value.low <= 0.7 <= found.value.high
    assert 52 <= covered <= 60  # 95% nominal


def test_interval_matches_a_plain_bootstrap_of_a_ratio() -> None:
    generator = np.random.default_rng(1)
    nll, tokens = generator.gamma(2, 10, 80), generator.integers(1, 30, 80)
    found = intervals(perplexity_sums(nll, tokens), seed=5)
    draws = np.random.default_rng(9).integers(0, 80, (2000, 80))
    plain = [perplexity(nll[draw], tokens[draw]) for draw in draws]
    low, high = np.percentile(plain, (2.5, 97.5))
    width = high - low
    assert found is not None
    assert abs(found.value.low - low) < 0.15 * width
    assert abs(found.value.high - high) < 0.15 * width


def test_paired_difference_of_identical_systems_is_zero() -> None:
    rows = mean_sums([1, 0, 1, 1, 0, 0, 1])
    found = intervals(rows, rows)
    assert found is not None
    assert found.difference == (0, 0)
    assert found.base == found.value
    assert found.value.low < found.value.high


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(2)
    base = generator.random(300) < 0.6
    better = base | (generator.random(300) < 0.2)
    found = intervals(mean_sums(better), mean_sums(base))
    assert found is not None and found.base is not None and found.difference is not None
    separate = (found.value.high - found.base.low) - (found.value.low - found.base.high)
    assert found.difference.low > 0
    assert found.difference.high - found.difference.low < 0.6 * separate


def test_intervals_are_seeded_and_do_not_depend_on_chunks(monkeypatch) -> None:
    from haori.evaluation import bootstrap

    rows = mean_sums(np.arange(50) % 3 == 0)
    once = intervals(rows, seed=3)
    monkeypatch.setattr(bootstrap, "_CHUNK", 1000)
    assert intervals(rows, seed=3) == once
    assert intervals(rows, seed=4) != once


def test_one_row_has_no_interval() -> None:
    assert intervals(mean_sums([1])) is None


def test_mcnemar_is_the_exact_binomial() -> None:
    first = [True] * 9 + [False] + [True] * 5
    second = [False] * 9 + [True] + [True] * 5
    # b = 9, c = 1: 2 * (C(10,0) + C(10,1)) / 2**10
    assert mcnemar(first, second) == (9, 1, pytest.approx(22 / 1024))
    assert mcnemar(first, first).p_value == 1.0
    assert 0 < mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000).p_value < 1e-40
