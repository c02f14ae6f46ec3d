"""AUROC and average precision against scikit-learn, on the rows and on resamples of them."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from haori.metrics.ranking import auroc, average_precision

# Few different scores, so that most rows are tied with others.
few_scores = st.sampled_from([0.0, 0.1, 0.1 + 1e-12, 0.5, 0.9, 1.0])
scores = st.one_of(few_scores, st.floats(0, 1))
rows = st.lists(st.tuples(scores, st.booleans(), st.integers(0, 3)), min_size=1, max_size=25)


def by_scikit_learn(metric, scores, targets):
    """Return the mean over labels on which the metric is defined; NaN if it is on none."""
    found = []
    for label in range(scores.shape[1]):
        positives = int(targets[:, label].sum())
        if positives and (metric is average_precision_score or positives < len(targets)):
            found.append(metric(targets[:, label], scores[:, label]))
    return np.mean(found) if found else np.nan


@given(rows)
@settings(max_examples=150, deadline=None)
def test_one_label_equals_scikit_learn(rows) -> None:
    s, y, counts = (np.array(column) for column in zip(*rows, strict=True))
    for statistic, metric in ((auroc(s, y), roc_auc_score), (average_precision(s, y), average_precision_score)):
        assert statistic.rows == len(s)
        plain = by_scikit_learn(metric, s[:, None], y[:, None])
        assert statistic.value == pytest.approx(plain, abs=1e-12, nan_ok=True)
        drawn = by_scikit_learn(metric, np.repeat(s, counts)[:, None], np.repeat(y, counts)[:, None])
        both = statistic.resampled(np.stack([counts, np.ones(len(s))]))
        assert both == pytest.approx([drawn, plain], abs=1e-12, nan_ok=True)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_means_over_labels_equal_scikit_learn(seed, labels, n) -> None:
    generator = np.random.default_rng(seed)
    s, y = generator.integers(0, 8, (n, labels)) / 8, generator.random((n, labels)) < 0.3
    counts = np.bincount(generator.integers(0, n, n), minlength=n)
    for statistic, metric in ((auroc(s, y), roc_auc_score), (average_precision(s, y), average_precision_score)):
        assert statistic.value == pytest.approx(by_scikit_learn(metric, s, y), abs=1e-12, nan_ok=True)
        drawn = by_scikit_learn(metric, np.repeat(s, counts, axis=0), np.repeat(y, counts, axis=0))
        assert statistic.resampled(counts[None].astype(float)) == pytest.approx([drawn], abs=1e-12, nan_ok=True)


def test_several_labels_are_one_against_the_rest() -> None:
    generator = np.random.default_rng(0)
    p = generator.dirichlet(np.ones(4), 300)
    y = generator.integers(0, 4, 300)
    expected = roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert auroc(p, np.eye(4)[y]).value == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score(np.eye(4)[y], p, average="macro")
    assert average_precision(p, np.eye(4)[y]).value == pytest.approx(expected, abs=1e-12)


def test_perfect_reversed_and_useless_scores() -> None:
    y = np.array([0, 0, 1, 1, 1])
    assert auroc(y, y).value == average_precision(y, y).value == 1.0
    assert auroc(-y, y).value == 0.0
    # Positives last: precision at the three thresholds is that of all five rows, one threshold for all three.
    assert average_precision(-y, y).value == pytest.approx(3 / 5)
    assert auroc(np.zeros(5), y).value == 0.5
    assert average_precision(np.zeros(5), y).value == pytest.approx(3 / 5)


def test_two_rows_with_ties() -> None:
    assert auroc([0.5, 0.5], [True, False]).value == 0.5
    assert average_precision([0.5, 0.5], [True, False]).value == 0.5
    counts = np.array([[3.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    assert auroc([0.5, 0.5], [True, False]).resampled(counts) == pytest.approx([0.5, np.nan, np.nan], nan_ok=True)
    found = average_precision([0.5, 0.5], [True, False]).resampled(counts)
    assert found == pytest.approx([3 / 4, np.nan, 1.0], nan_ok=True)


def test_one_class_and_one_row_are_not_defined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(auroc([0.1, 0.9], [1, 1]).value)
        assert np.isnan(auroc([0.1], [0]).value)
        assert np.isnan(average_precision([0.1, 0.9], [0, 0]).value)
        assert average_precision([0.1], [1]).value == 1.0


def test_a_label_absent_from_a_resample_is_left_out_of_its_mean() -> None:
    s = np.array([[0.9, 0.8], [0.2, 0.3], [0.4, 0.1]])
    y = np.array([[1, 0], [0, 1], [0, 0]], bool)
    without_second = auroc(s, y).resampled(np.array([[1.0, 0.0, 2.0]]))
    assert without_second == pytest.approx([1.0])  # the first label's alone
    assert auroc(s, y).value == pytest.approx((1.0 + 0.5) / 2)
