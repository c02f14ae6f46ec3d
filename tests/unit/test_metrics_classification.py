"""The metrics of a classifier together: names, notes, and what is refused."""

import time

import numpy as np
import pytest
from sklearn import metrics as sk

from haori.core.errors import DataError, InputError, VerificationError
from haori.evaluation.bootstrap import intervals
from haori.metrics.classification import (
    labels_above,
    multi_label_metrics,
    single_label_metrics,
    token_metrics,
    top_labels,
)
from haori.metrics.kinds import KINDS, in_order, kind_of, label_metric

LABELS = ("bad", "fair", "good")


def values(statistics):
    return {name: statistic.value for name, statistic in statistics.items()}


def softmax_rows(n, labels=3, seed=0):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(labels), n)
    return p, generator.integers(0, labels, n)


def test_three_labels_equal_scikit_learn() -> None:
    p, y = softmax_rows(200)
    found = single_label_metrics(p, [LABELS[place] for place in y], LABELS)
    top = p.argmax(axis=1)
    assert values(found.statistics) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(y, top),
            "macro_f1": sk.f1_score(y, top, average="macro"),
            "micro_f1": sk.f1_score(y, top, average="micro"),
            "mcc": sk.matthews_corrcoef(y, top),
            "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
            "aupr": sk.average_precision_score(np.eye(3)[y], p),
            "calibration_error": found.statistics["calibration_error"].value,  # test_metrics_calibration
            "log_loss": sk.log_loss(y, p),
        }
    )
    assert found.confusion == tuple(map(tuple, sk.confusion_matrix(y, top).tolist()))
    report = sk.classification_report(y, top, target_names=LABELS, output_dict=True)
    for label in LABELS:
        for metric, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert found.by_label[label_metric(metric, label)].value == pytest.approx(report[label][key])
    assert len(found.by_label) == 9


def test_of_two_labels_the_second_is_positive() -> None:
    p, y = softmax_rows(100, labels=2)
    found = single_label_metrics(p, ["no" if place == 0 else "yes" for place in y], ("no", "yes"))
    assert found.statistics["auroc"].value == pytest.approx(sk.roc_auc_score(y, p[:, 1]))
    assert found.statistics["aupr"].value == pytest.approx(sk.average_precision_score(y, p[:, 1]))
    assert any("'yes' as the positive label" in note for note in found.notes)


def test_several_labels_per_row_equal_scikit_learn() -> None:
    generator = np.random.default_rng(1)
    p, y = generator.random((150, 3)), generator.random((150, 3)) < 0.4
    p[0] = 0.5  # on the threshold: given
    references = [{label for label, has in zip(LABELS, row, strict=True) if has} for row in y]
    found = multi_label_metrics(p, references, LABELS)
    given = p >= 0.5
    expected = {
        "exact_match": sk.accuracy_score(y, given),
        "macro_f1": sk.f1_score(y, given, average="macro"),
        "micro_f1": sk.f1_score(y, given, average="micro"),
        "auroc": sk.roc_auc_score(y, p, average="macro"),
        "aupr": sk.average_precision_score(y, p, average="macro"),
    }
    assert values(found.statistics) == pytest.approx(
        expected | {"calibration_error": found.statistics["calibration_error"].value}
    )
    assert found.confusion is None
    assert labels_above(p, LABELS)[0] == LABELS


def test_calibration_of_several_labels_is_over_all_decisions() -> None:
    p, references = np.array([[0.9, 0.2], [0.4, 0.55]]), [{"a"}, {"a"}]
    # Decisions: 0.9 right, 0.8 right, 0.6 wrong, 0.55 wrong, each in a bin of its own.
    expected = (0.1 + 0.2 + 0.6 + 0.55) / 4
    found = multi_label_metrics(p, references, ("a", "b")).statistics["calibration_error"].value
    assert found == pytest.approx(expected)


def test_rows_of_one_class_leave_out_what_is_not_defined() -> None:
    p, _ = softmax_rows(10)
    found = single_label_metrics(p, ["good"] * 10, LABELS)
    # Average precision of the one label that has rows is 1, AUROC is defined for none.
    assert found.statistics["aupr"].value == 1.0
    assert "auroc" not in found.statistics
    assert "Not defined on these rows, and left out: AUROC." in found.notes
    assert label_metric("recall", "bad") not in found.by_label
    assert all(np.isfinite(list(values(found.statistics | found.by_label).values())))


def test_one_row_and_one_label() -> None:
    one = single_label_metrics([[1.0]], ["only"], ("only",))
    assert one.statistics["accuracy"].value == one.statistics["macro_f1"].value == 1.0
    assert one.statistics["mcc"].value == 0.0 and one.statistics["log_loss"].value == 0.0
    several = multi_label_metrics([[0.7], [0.2]], [{"x"}, set()], ("x",))
    assert several.statistics["exact_match"].value == several.statistics["auroc"].value == 1.0
    empty = multi_label_metrics([[0.1, 0.2]], [set()], ("x", "y"))
    assert set(empty.statistics) == {"exact_match", "calibration_error"}
    assert empty.notes[-1] == "Not defined on these rows, and left out: Macro F1, Micro F1, AUROC, AUPR."


def test_perfect_and_random_scores() -> None:
    y = np.random.default_rng(2).integers(0, 3, 2000)
    perfect = values(single_label_metrics(np.eye(3)[y], [LABELS[place] for place in y], LABELS).statistics)
    assert perfect == pytest.approx({**dict.fromkeys(perfect, 1.0), "calibration_error": 0.0, "log_loss": 0.0})
    p, _ = softmax_rows(2000, seed=3)
    random = values(single_label_metrics(p, [LABELS[place] for place in y], LABELS).statistics)
    assert random["auroc"] == pytest.approx(0.5, abs=0.03)
    assert random["mcc"] == pytest.approx(0.0, abs=0.05)


def test_tokens_have_entities_where_the_labels_are_bio() -> None:
    labels = ("O", "B-PER", "I-PER")
    rows = [["B-PER", "I-PER", "O"], ["O"]]
    found = token_metrics(rows, rows, labels)
    assert values(found.statistics) == dict.fromkeys(
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"), 1.0
    )
    assert "strictly" in found.notes[0]
    assert set(token_metrics([["NOUN"]], [["VERB"]], ("NOUN", "VERB")).statistics) == {"token_accuracy"}
    assert token_metrics([["O"]], [["O"]], labels).notes[-1] == (
        "Not defined on these rows, and left out: Entity F1, Entity recall."
    )


@pytest.mark.parametrize("measure", [single_label_metrics, multi_label_metrics])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_a_sentence(measure, broken) -> None:
    with pytest.raises(VerificationError, match="not numbers on 1 of 2 rows; its weights are broken"):
        measure([[broken, 0.5], [0.5, 0.5]], [("a",), ("a",)] if measure is multi_label_metrics else ["a", "a"], "ab")


def test_probabilities_that_do_not_sum_to_one_are_a_sentence() -> None:
    with pytest.raises(InputError, match=r"row 2 sum to 1.2, not to 1; give those of a softmax"):
        single_label_metrics([[0.5, 0.5], [0.6, 0.6]], ["a", "b"], "ab")
    with pytest.raises(InputError, match=r"range from -3 to 4, not from 0 to 1; give no logits"):
        multi_label_metrics([[-3.0, 4.0]], [{"a"}], "ab")
    p = np.float32([[0.3333333, 0.6666667]])
    assert single_label_metrics(p, ["b"], "ab").statistics["accuracy"].value == 1.0


def test_rows_that_cannot_be_measured_are_a_sentence() -> None:
    with pytest.raises(InputError, match="no row to measure"):
        single_label_metrics(np.zeros((0, 2)), [], "ab")
    with pytest.raises(InputError, match="no labelled token"):
        token_metrics([[]], [[]], ("O",))
    with pytest.raises(DataError, match=r"Row 2 has the label 'god', which .* did you mean 'good'"):
        single_label_metrics(softmax_rows(2)[0], ["good", "god"], LABELS)
    with pytest.raises(DataError, match=r"Row 1 has the label 'xyz', which .* its labels are 'bad', 'fair', 'good'"):
        multi_label_metrics(softmax_rows(1)[0], [{"xyz"}], LABELS)


def test_answers_are_the_top_labels() -> None:
    assert top_labels([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]], LABELS) == ["fair", "bad"]


def test_every_metric_says_how_it_is_read() -> None:
    p, y = softmax_rows(30)
    found = single_label_metrics(p, [LABELS[place] for place in y], LABELS)
    several = multi_label_metrics(p, [{LABELS[place]} for place in y], LABELS)
    tokens = token_metrics([["B-X"]], [["B-X"]], ("O", "B-X", "I-X"))
    assert {*found.statistics, *several.statistics, *tokens.statistics} <= set(KINDS)
    assert kind_of("recall[a [b]]").title == "Recall, a [b]"
    assert in_order(["f1[x]", "mcc", "no such metric", "accuracy"]) == ["accuracy", "mcc", "f1[x]"]
    with pytest.raises(KeyError):
        kind_of("no such metric")


def test_intervals_of_every_metric_take_well_under_a_second() -> None:
    p, y = softmax_rows(1000)
    found = single_label_metrics(p, [LABELS[place] for place in y], LABELS)
    for name, statistic in found.statistics.items():
        started = time.process_time()
        ends = intervals(statistic)
        assert time.process_time() - started < 2, name  # 0.03 to 0.2 s on an idle machine
        assert ends is not None and ends.value.low <= statistic.value <= ends.value.high, name
