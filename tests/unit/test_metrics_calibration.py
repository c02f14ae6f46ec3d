"""Calibration error against its formula, log loss against scikit-learn."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from haori.metrics.calibration import CALIBRATION_BINS, calibration_sums, log_loss_sums

decisions = st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40)


def by_formula(confidences, right):
    """Guo et al. 2017, equation 3: sum over M bins of |B_m| / n |acc(B_m) - conf(B_m)|."""
    n, error = len(confidences), 0.0
    edges = [number / 15 for number in range(16)]
    for low, high in pairwise(edges):
        inside = [at for at in range(n) if low < confidences[at] <= high or (low == 0 and confidences[at] == 0)]
        if inside:
            accuracy = math.fsum(right[at] for at in inside) / len(inside)
            confidence = math.fsum(confidences[at] for at in inside) / len(inside)
            error += len(inside) / n * abs(accuracy - confidence)
    return error


@given(decisions)
@settings(max_examples=150, deadline=None)
def test_calibration_error_is_that_of_the_paper(rows) -> None:
    sure, right, counts = (np.array(column) for column in zip(*rows, strict=True))
    statistic = calibration_sums(sure, right)
    assert statistic.value == pytest.approx(by_formula(sure, right), abs=1e-12)
    if counts.sum():
        drawn = by_formula(np.repeat(sure, counts), np.repeat(right, counts))
        assert statistic.resampled(counts[None].astype(float)) == pytest.approx([drawn], abs=1e-12)


def test_calibration_error_by_hand() -> None:
    assert CALIBRATION_BINS == 15
    # Bins (9/15, 10/15] and (14/15, 1]: 2 rows of 0.62 with one right, and 2 of 1.0 with both right.
    assert calibration_sums([0.62, 0.62, 1.0, 1.0], [1, 0, 1, 1]).value == pytest.approx(2 / 4 * 0.12)
    # A probability on an edge belongs to the bin below it: 0.2 = 3/15 shares no bin with 0.21.
    assert calibration_sums([0.2, 0.21], [1, 0]).value == pytest.approx((0.8 + 0.21) / 2)
    assert calibration_sums([0.19, 0.2], [1, 0]).value == pytest.approx(abs(0.81 - 0.2) / 2)


def test_decisions_of_one_row_are_drawn_together() -> None:
    sure, right = np.array([[0.9, 0.6], [0.7, 0.8]]), np.array([[1, 0], [1, 1]])
    drawn = by_formula([0.9, 0.6, 0.9, 0.6, 0.7, 0.8], [1, 0, 1, 0, 1, 1])
    assert calibration_sums(sure, right).resampled(np.array([[2.0, 1.0]])) == pytest.approx([drawn])


def test_perfect_answers_of_full_confidence_have_no_error() -> None:
    assert calibration_sums(np.ones(5), np.ones(5)).value == 0.0
    assert calibration_sums(np.ones(5), np.zeros(5)).value == 1.0
    assert calibration_sums([1.0], [1]).value == 0.0


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_log_loss_is_scikit_learns(seed, n, labels) -> None:
    generator = np.random.default_rng(seed)
    p, y = generator.dirichlet(np.full(labels, 0.3), n), generator.integers(0, labels, n)
    counts = np.bincount(generator.integers(0, n, n), minlength=n)
    statistic = log_loss_sums(p[np.arange(n), y])
    assert statistic.value == pytest.approx(log_loss(y, p, labels=[*range(labels)]), rel=1e-9)
    drawn = log_loss(np.repeat(y, counts), np.repeat(p, counts, axis=0), labels=[*range(labels)])
    assert statistic.resampled(counts[None].astype(float)) == pytest.approx([drawn], rel=1e-9)


def test_a_probability_of_zero_is_scikit_learns_figure() -> None:
    expected = log_loss([0, 1], [[0.0, 1.0], [0.5, 0.5]])
    assert log_loss_sums([0.0, 0.5]).value == pytest.approx(expected, rel=1e-12)
