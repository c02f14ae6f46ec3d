"""Intervals by bootstrap over rows, paired differences and McNemar's test."""

import numpy as np
import pytest

from haori.evaluation.bootstrap import intervals, mcnemar
from haori.metrics.likelihood import perplexity, perplexity_sums
from haori.metrics.ranking import auroc
from haori.metrics.statistics import mean_of, mean_sums
from haori.metrics.text import bleu_sums


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


def by_column_sums(statistic, base, seed):
    """The bootstrap of column sums as it was before statistics could be anything else than sums."""
    n, draws = statistic.rows, []
    generator = np.random.default_rng(seed)
    while len(draws) < 2000:
        r = min(max(1, 2_000_000 // n), 2000 - len(draws))
        draws += [np.bincount(pick, minlength=n).astype(float) for pick in generator.integers(0, n, (r, n))]
    sums = np.stack(draws) @ np.concatenate([statistic.terms, base.terms], axis=1)
    width = statistic.terms.shape[1]
    value, other = statistic.score(sums[:, :width]), base.score(sums[:, width:])
    return [tuple(np.percentile(one, (2.5, 97.5)).tolist()) for one in (value, other, value - other)]


@pytest.mark.parametrize("n", [2, 37, 1000, 1501])
def test_intervals_are_those_of_column_sums(n) -> None:
    generator = np.random.default_rng(n)
    pairs = [(mean_sums(generator.random(n) < 0.7), mean_sums(generator.random(n) < 0.6))]
    words = np.array(["the", "cat", "sat", "on", "mat"])
    first, second, reference = ([" ".join(generator.choice(words, 6)) for _ in range(n)] for _ in range(3))
    pairs.append((bleu_sums(first, reference), bleu_sums(second, reference)))
    for pair in pairs:  # whole numbers: the same to the last digit
        assert [tuple(ends) for ends in intervals(*pair, seed=4)] == by_column_sums(*pair, seed=4)
    tokens = generator.integers(1, 30, n)
    pair = tuple(perplexity_sums(generator.gamma(2, 10, n), tokens) for _ in range(2))
    # Sums of likelihoods may be added in another order, which moves the last bit.
    found = np.ravel(intervals(*pair, seed=4))
    assert found == pytest.approx(np.ravel(by_column_sums(*pair, seed=4)), rel=1e-13, abs=1e-13)


def test_mean_of_several_systems_is_drawn_together() -> None:
    right = np.arange(40) % 4 > 0
    mean = mean_of([mean_sums(right), mean_sums(~right)])
    found = intervals(mean)
    assert mean.value == 0.5 and mean.rows == 40
    assert found is not None
    assert found.value == pytest.approx((0.5, 0.5))  # what one gains the other loses, on every draw
    ranked = mean_of([auroc([0.1, 0.9, 0.4], [0, 1, 0]), auroc([0.9, 0.1, 0.4], [0, 1, 0])])
    assert ranked.value == 0.5


def test_draws_on_which_a_metric_is_not_defined_are_left_out() -> None:
    scores, targets = np.array([0.9, 0.5, 0.6, 0.2]), np.array([True, True, False, False])
    statistic, base = auroc(scores, targets), auroc(1 - scores, targets)
    found = intervals(statistic, base, seed=1)
    assert found is not None and found.base is not None and found.difference is not None
    draws = np.random.default_rng(1).integers(0, 4, (2000, 4))
    kept = [draw for draw in draws if 0 < targets[draw].sum() < 4]
    assert len(kept) < 2000
    pairs = [
        [scores[i] > scores[j] for i in draw if targets[i] for j in draw if not targets[j]]
        for draw in kept
    ]  # fmt: skip
    low, high = np.percentile([np.mean(right) for right in pairs], (2.5, 97.5))
    assert found.value == pytest.approx((low, high))
    assert found.base == pytest.approx((1 - high, 1 - low))
    assert intervals(auroc([0.1, 0.2], [True, True])) is None


def test_systems_measured_on_different_rows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="not 3 and 2"):
        intervals(mean_sums([1, 0, 1]), mean_sums([1, 0]))
