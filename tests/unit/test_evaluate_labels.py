"""Is it a label task, and which tokens are its labels."""

import pytest

from haori.core.errors import DataError
from haori.data import Conversation, render_row
from haori.tasks.causal_lm.labels import check_labels, detect_labels, label_tokens


def conversations(answers):
    return [
        Conversation(
            messages=({"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": answer}), origin=f"d:{n}"
        )
        for n, answer in enumerate(answers)
    ]


def test_label_tasks_are_found() -> None:
    assert detect_labels(["no", "yes", "yes", "no ", "yes", "yes"]) == ("no", "yes")


@pytest.mark.parametrize(
    "references",
    [
        ["yes"] * 9,  # one label is no choice
        ["yes", "yes", "no", "no"],  # twice each, but not three times on average
        ["yes"] * 8 + ["no"],  # once is not a label
        ["yes"] * 4 + ["this is not a label at all"] * 4,
        [f"answer {n}" for n in range(21) for _ in range(3)],
        ["yes"] * 4 + [""] * 4,
        [],
    ],
)
def test_other_tasks_are_not(references) -> None:
    assert detect_labels(references) is None


def test_given_labels_keep_their_order() -> None:
    assert check_labels([" yes ", "no"], ["no", "yes"]) == ("yes", "no")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes"], "at least two"),
        (["yes", ""], "at least two, none empty"),
        (["yes", "yes"], "'yes' is given twice"),
        (["yes", "nope"], "'nope' is the answer of no row; did you mean 'no'"),
        (["yes", "purple"], "'purple' is the answer of no row; The answers are"),
        (["yes", "no"], "1 of 3 rows have an answer that is not among the labels.*'maybe'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(labels, ["yes", "no", "maybe"])


def test_tokens_are_those_that_training_teaches(tiny_tokenizer) -> None:
    rows = conversations(["positive", "negative"])
    found = label_tokens(tiny_tokenizer, rows, ("negative", "positive"))
    for row, ids in zip(reversed(rows), found.ids, strict=True):
        trained = [label for label in render_row(tiny_tokenizer, row).labels if label != -100]
        assert [*ids, tiny_tokenizer.eos_token_id] == trained
    assert not found.with_end


def test_end_of_turn_is_scored_where_one_label_begins_another(tiny_tokenizer) -> None:
    found = label_tokens(tiny_tokenizer, conversations(["good", "good film"]), ("good", "good film"))
    assert found.with_end
    assert all(ids[-1] == tiny_tokenizer.eos_token_id for ids in found.ids)
    assert found.ids[1][: len(found.ids[0]) - 1] == found.ids[0][:-1]


def test_white_space_of_the_answers_is_kept(tiny_tokenizer) -> None:
    found = label_tokens(tiny_tokenizer, conversations([" yes", " yes", "yes", " no"]), ("yes", "no"))
    assert [tiny_tokenizer.decode(ids) for ids in found.ids] == [" yes", " no"]
