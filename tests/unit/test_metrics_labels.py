"""Metrics of labels against hand-computed values and scikit-learn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.metrics.labels import accuracy, confusion_matrix, f1, f1_sums

LABELS = ("a", "b", "c")
labelled = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=2, max_size=30)


def test_f1_by_hand() -> None:
    answers, references = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    # a: TP 1, FP 1, FN 0 -> 2/3; b: TP 2, FP 0, FN 1 -> 4/5
    assert f1(answers, references, ("a", "b"), "macro") == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert f1(answers, references, ("a", "b"), "micro") == pytest.approx(0.75)
    assert accuracy(answers, references) == 0.75
    assert confusion_matrix(answers, references, ("a", "b")) == ((1, 0), (1, 2))


@given(labelled)
@settings(max_examples=60, deadline=None)
def test_f1_sums_equal_scikit_learn(rows) -> None:
    answers, references = zip(*rows, strict=True)
    value = f1_sums(answers, references, LABELS).value
    assert value == pytest.approx(f1(answers, references, LABELS, "macro"))
