"""Metrics against hand-computed values and the libraries they come from."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.evaluation import metrics, sums
from haori.evaluation.bootstrap import intervals, mcnemar

LABELS = ("a", "b", "c")
labelled = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=2, max_size=30)
texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", ",", "film!"]), max_size=9).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


def test_perplexity_weighs_by_tokens() -> None:
    # 2 tokens at 1 nat each and 8 tokens at 0.5 nat each: exp(6 / 10), not the mean of e and sqrt(e).
    assert metrics.perplexity([2.0, 4.0], [2, 8]) == pytest.approx(math.exp(0.6))


def test_exact_match_normalises() -> None:
    answers = ["Ｙｅｓ.", " two\n words ", "no", "no!"]
    assert metrics.exact_match(answers, ["yes", "two words", "yes", "no"]).tolist() == [True, True, False, False]


def test_f1_by_hand() -> None:
    answers, references = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    # a: TP 1, FP 1, FN 0 -> 2/3; b: TP 2, FP 0, FN 1 -> 4/5
    assert metrics.f1(answers, references, ("a", "b"), "macro") == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics.f1(answers, references, ("a", "b"), "micro") == pytest.approx(0.75)
    assert metrics.accuracy(answers, references) == 0.75
    assert metrics.confusion_matrix(answers, references, ("a", "b")) == ((1, 0), (1, 2))


@given(labelled)
@settings(max_examples=60, deadline=None)
def test_f1_sums_equal_scikit_learn(rows) -> None:
    answers, references = zip(*rows, strict=True)
    value = sums.f1_sums(answers, references, LABELS).value
    assert value == pytest.approx(metrics.f1(answers, references, LABELS, "macro"))


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_bleu_and_chrf_sums_equal_sacrebleu(rows) -> None:
    answers, references = map(list, zip(*rows, strict=True))
    assert sums.bleu_sums(answers, references).value == pytest.approx(metrics.bleu(answers, references).value)
    assert sums.chrf_sums(answers, references).value == pytest.approx(metrics.chrf(answers, references).value)


def test_bleu_is_sacrebleus_own_number_and_names_its_settings() -> None:
    import sacrebleu

    answers = ["The cat sat on the mat.", "A film that is worth seeing"]
    references = ["The cat sat on a mat.", "A film worth seeing twice"]
    found = metrics.bleu(answers, references)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert 0 < found.value < 100
    assert "tok:13a" in found.signature and "version:" in found.signature
    assert metrics.chrf(answers, references).value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)


def test_bleu_counts_characters_where_words_have_no_spaces() -> None:
    found = metrics.bleu(["今日は天気が良いですね"], ["今日は天気が良いです"])
    assert "tok:char" in found.signature
    assert found.value > 50


def test_intervals_hold_the_value_and_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        right = generator.random(100) < 0.7
        found = intervals(sums.mean_sums(right), resamples=300, seed=trial)
        assert found is not None
        assert found.value.low <= right.mean() <= found.value.high
        covered += found.value.low <= 0.7 <= found.value.high
    assert 52 <= covered <= 60  # 95% nominal


def test_interval_matches_a_plain_bootstrap_of_a_ratio() -> None:
    generator = np.random.default_rng(1)
    nll, tokens = generator.gamma(2, 10, 80), generator.integers(1, 30, 80)
    found = intervals(sums.perplexity_sums(nll, tokens), seed=5)
    draws = np.random.default_rng(9).integers(0, 80, (2000, 80))
    plain = [metrics.perplexity(nll[draw], tokens[draw]) for draw in draws]
    low, high = np.percentile(plain, (2.5, 97.5))
    width = high - low
    assert found is not None
    assert abs(found.value.low - low) < 0.15 * width
    assert abs(found.value.high - high) < 0.15 * width


def test_paired_difference_of_identical_systems_is_zero() -> None:
    rows = sums.mean_sums([1, 0, 1, 1, 0, 0, 1])
    found = intervals(rows, rows)
    assert found is not None
    assert found.difference == (0, 0)
    assert found.base == found.value
    assert found.value.low < found.value.high


def test_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(2)
    base = generator.random(300) < 0.6
    better = base | (generator.random(300) < 0.2)
    found = intervals(sums.mean_sums(better), sums.mean_sums(base))
    assert found is not None and found.base is not None and found.difference is not None
    separate = (found.value.high - found.base.low) - (found.value.low - found.base.high)
    assert found.difference.low > 0
    assert found.difference.high - found.difference.low < 0.6 * separate


def test_intervals_are_seeded_and_do_not_depend_on_chunks(monkeypatch) -> None:
    from haori.evaluation import bootstrap

    rows = sums.mean_sums(np.arange(50) % 3 == 0)
    once = intervals(rows, seed=3)
    monkeypatch.setattr(bootstrap, "_CHUNK", 1000)
    assert intervals(rows, seed=3) == once
    assert intervals(rows, seed=4) != once


def test_one_row_has_no_interval() -> None:
    assert intervals(sums.mean_sums([1])) is None


def test_mcnemar_is_the_exact_binomial() -> None:
    first = [True] * 9 + [False] + [True] * 5
    second = [False] * 9 + [True] + [True] * 5
    # b = 9, c = 1: 2 * (C(10,0) + C(10,1)) / 2**10
    assert mcnemar(first, second) == (9, 1, pytest.approx(22 / 1024))
    assert mcnemar(first, first).p_value == 1.0
    assert 0 < mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000).p_value < 1e-40
