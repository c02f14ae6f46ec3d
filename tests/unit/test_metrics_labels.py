"""Metrics of labels against hand-computed values and scikit-learn."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from haori.metrics.labels import (
    accuracy,
    confusion_matrix,
    exact_set_sums,
    f1,
    f1_sums,
    label_f1_sums,
    macro_f1_sums,
    mcc_sums,
    micro_f1_sums,
    one_hot,
    precision_sums,
    recall_sums,
)

LABELS = ("a", "b", "c")
labelled = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS), st.integers(0, 3)), min_size=1, max_size=30
)
indicators = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.tuples(*[st.lists(st.booleans(), min_size=width, max_size=width)] * 2, st.integers(0, 3)),
        min_size=1, max_size=20,
    )
)  # fmt: skip


def check(statistic, oracle, answers, references, counts) -> None:
    """Hold a statistic against a function of (references, answers), on the rows and on the rows repeated."""
    answers, references = np.array(answers), np.array(references)
    assert statistic.rows == len(answers)
    drawn = [oracle(references, answers), oracle(references, answers)]
    if sum(counts):
        drawn[1] = oracle(np.repeat(references, counts, axis=0), np.repeat(answers, counts, axis=0))
    found = statistic.resampled(np.array([np.ones(len(counts)), counts if sum(counts) else np.ones(len(counts))]))
    assert [statistic.value, *found] == pytest.approx([drawn[0], *drawn], abs=1e-12, nan_ok=True)


def quietly(metric, **options):
    def call(references, answers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of labels that are absent
            return metric(references, answers, **options)

    return call


def test_f1_by_hand() -> None:
    answers, references = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    # a: TP 1, FP 1, FN 0 -> 2/3; b: TP 2, FP 0, FN 1 -> 4/5
    assert f1(answers, references, ("a", "b"), "macro") == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(answers, references, ("a", "b"), "micro") == pytest.approx(0.75)
    assert accuracy(answers, references) == 0.75
    assert confusion_matrix(answers, references, ("a", "b")) == ((1, 0), (1, 2))


@given(labelled)
@settings(max_examples=40, deadline=None)
def test_one_label_per_row_equals_scikit_learn(rows) -> None:
    answers, references, counts = map(list, zip(*rows, strict=True))
    given, expected = one_hot(answers, LABELS), one_hot(references, LABELS)
    plain = answers, references, counts
    assert confusion_matrix(answers, references, LABELS) == tuple(
        map(tuple, sk.confusion_matrix(references, answers, labels=LABELS).tolist())
    )
    check(f1_sums(answers, references, LABELS), quietly(sk.f1_score, average="macro"), *plain)
    check(micro_f1_sums(given, expected), quietly(sk.f1_score, average="micro"), *plain)
    check(micro_f1_sums(given, expected), sk.accuracy_score, *plain)
    check(mcc_sums(given, expected), quietly(sk.matthews_corrcoef), *plain)
    for place, label in enumerate(LABELS):
        columns, one = (given[:, place], expected[:, place]), {"labels": [label], "average": "macro"}
        check(precision_sums(*columns), quietly(sk.precision_score, zero_division=0.0, **one), *plain)
        check(recall_sums(*columns), quietly(sk.recall_score, zero_division=np.nan, **one), *plain)
        check(label_f1_sums(*columns), quietly(sk.f1_score, zero_division=np.nan, **one), *plain)


@given(indicators)
@settings(max_examples=40, deadline=None)
def test_several_labels_per_row_equal_scikit_learn(rows) -> None:
    answers, references, counts = map(list, zip(*rows, strict=True))
    given, expected = np.array(answers), np.array(references)

    def mean_over_labels(references, answers):
        values = [
            quietly(sk.f1_score, zero_division=np.nan)(references[:, label], answers[:, label])
            for label in range(references.shape[1])
        ]
        known = [value for value in values if not np.isnan(value)]
        return np.mean(known) if known else np.nan

    check(macro_f1_sums(given, expected), mean_over_labels, answers, references, counts)
    check(exact_set_sums(given, expected), lambda r, a: (r == a).all(axis=1).mean(), answers, references, counts)
    if given.shape[1] > 1:  # scikit-learn reads one column as one label per row
        micro = quietly(sk.f1_score, average="micro", zero_division=np.nan)
        check(micro_f1_sums(given, expected), micro, answers, references, counts)


def test_correlation_of_one_label_is_zero_and_of_opposite_answers_is_minus_one() -> None:
    same = one_hot(["a", "a"], LABELS)
    assert mcc_sums(same, same).value == 0.0
    assert mcc_sums(one_hot("abab", "ab"), one_hot("baba", "ab")).value == pytest.approx(-1.0)
    assert mcc_sums(one_hot("abcabc", LABELS), one_hot("abcabc", LABELS)).value == pytest.approx(1.0)


def test_a_label_absent_from_a_resample_has_no_recall() -> None:
    given, expected = np.array([1, 0, 1]), np.array([1, 1, 0])
    without = np.array([[0.0, 0.0, 2.0]])
    assert np.isnan(recall_sums(given, expected).resampled(without)).all()
    assert precision_sums(given, expected).resampled(without).tolist() == [0.0]  # answered, and never right
    assert label_f1_sums(given, expected).resampled(without).tolist() == [0.0]
    assert np.isnan(label_f1_sums(given, expected).resampled(np.array([[0.0, 0.0, 0.0]]))).all()
