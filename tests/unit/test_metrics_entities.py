"""Entities of BIO labels, with every expected value counted by hand from the definition of CoNLL-2003."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.metrics.entities import entities_of, entity_statistics, is_bio, token_accuracy

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
tagged = st.integers(1, 8).flatmap(lambda n: st.tuples(*[st.lists(st.sampled_from(TAGS), min_size=n, max_size=n)] * 2))


def tag_rows(*rows):
    return [row.split() for row in rows]


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),  # two of one type side by side
        ("O B-PER I-PER I-PER", {("PER", 1, 4)}),  # up to the last token
        ("I-PER I-PER O", set()),  # continues nothing
        ("B-PER I-LOC I-PER", {("PER", 0, 1)}),  # another type ends it, and marks nothing
        ("B-PER O I-PER", {("PER", 0, 1)}),
        ("B-geo-loc I-geo-loc", {("geo-loc", 0, 2)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_read_strictly(tags, entities) -> None:
    assert entities_of(tags.split()) == entities


def test_figures_by_hand() -> None:
    references = tag_rows("B-PER I-PER O B-LOC", "B-LOC O", "O O O")
    answers = tag_rows("B-PER I-PER O B-PER", "B-LOC I-LOC", "O B-PER O")
    # Expected 3 (PER 0-2, LOC 3-4, LOC 0-1); predicted 4 (PER 0-2, PER 3-4, LOC 0-2, PER 1-2); right 1 (PER 0-2).
    found = {name: statistic.value for name, statistic in entity_statistics(answers, references).items()}
    assert found == pytest.approx({"entity_precision": 1 / 4, "entity_recall": 1 / 3, "entity_f1": 2 / 7})
    assert token_accuracy(answers, references).value == pytest.approx(6 / 9)
    # The first row twice, the last not: expected 5, predicted 5, right 2; tokens right 3 + 3 + 1 of 10.
    counts = np.array([[2.0, 1.0, 0.0]])
    drawn = {name: statistic.resampled(counts)[0] for name, statistic in entity_statistics(answers, references).items()}
    assert drawn == pytest.approx({"entity_precision": 2 / 5, "entity_recall": 2 / 5, "entity_f1": 2 / 5})
    assert token_accuracy(answers, references).resampled(counts) == pytest.approx([7 / 10])


@given(st.lists(st.tuples(tagged, st.integers(0, 2)), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_drawing_a_row_twice_is_having_it_twice(rows) -> None:
    pairs = [pair for pair, _ in rows]
    answers, references = map(list, zip(*pairs, strict=True))
    counts = np.array([[float(count) for _, count in rows]])
    repeated = [pair for pair, count in rows for _ in range(count)]
    if not repeated:
        return
    drawn = entity_statistics(*map(list, zip(*repeated, strict=True)))
    for name, statistic in entity_statistics(answers, references).items():
        assert statistic.resampled(counts) == pytest.approx([drawn[name].value], nan_ok=True)
        assert statistic.resampled(np.ones((1, len(rows)))) == pytest.approx([statistic.value], nan_ok=True)


def test_nothing_predicted_and_nothing_expected() -> None:
    silent = entity_statistics([["O", "O"]], [["B-PER", "O"]])
    assert {name: one.value for name, one in silent.items()} == {
        "entity_precision": 0.0, "entity_recall": 0.0, "entity_f1": 0.0,
    }  # fmt: skip
    empty = entity_statistics([["O"]], [["O"]])
    assert np.isnan(empty["entity_recall"].value) and np.isnan(empty["entity_f1"].value)


def test_labels_that_mark_entities_are_told_from_others() -> None:
    assert is_bio(TAGS)
    assert is_bio(["B-PER", "I-PER"])
    assert not is_bio(["O"])
    assert not is_bio(["NOUN", "VERB"])
    assert not is_bio(["O", "I-PER"])  # nothing can begin
    assert not is_bio(["O", "B-PER", "E-PER", "S-PER"])  # another scheme
