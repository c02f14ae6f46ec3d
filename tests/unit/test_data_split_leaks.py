"""Cleaning, the split by content, and the leak check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import DataError
from haori.data.cleaning import clean_row, clean_text, is_empty
from haori.data.conversation import Conversation, words
from haori.data.leaks import THRESHOLD, find_leaks
from haori.data.split import choose_validation, points


def pair(prompt, answer, origin="f:1"):
    return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}), origin)


def text(body, origin="f:1"):
    return Conversation((), origin, text=body)


def split(rows, share=0.1):
    found = np.array([points(row) for row in rows]).reshape(-1, 2)
    held, note = choose_validation(found[:, 0], found[:, 1], share)
    return {row.hash: bool(h) for row, h in zip(rows, held, strict=True)}, note


# Cleaning


@pytest.mark.parametrize(
    ("given_text", "expected", "dirty"),
    [
        ("a\tb\nc", "a\tb\nc", False),
        ("a\r\nb\rc", "a\nb\nc", False),
        ("a\x00b\x1b[0m\x7f\x9f", "ab[0m", True),
        ("a\x0cb", "a\nb", True),
        ("a\ud800b", "ab", True),
        ("日本é🙂\u200d", "日本é🙂\u200d", False),
    ],
)
def test_clean_text(given_text, expected, dirty):
    assert clean_text(given_text) == (expected, dirty)


@given(st.text())
def test_clean_text_is_safe_and_done_once(value):
    cleaned, _ = clean_text(value)
    cleaned.encode("utf-8")
    assert clean_text(cleaned) == (cleaned, False)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in cleaned)


def test_clean_row_keeps_flags():
    row = Conversation(({"role": "assistant", "content": "a\x00", "loss": False},), "f:1")
    cleaned, dirty = clean_row(row)
    assert dirty
    assert cleaned.messages == ({"role": "assistant", "content": "a", "loss": False},)


def test_empty_rows():
    assert is_empty(text(" \n"))
    assert is_empty(pair("", "a"))
    assert is_empty(pair("q", " "))
    assert is_empty(Conversation((), "f:1"))
    assert not is_empty(pair("q", "a"))
    assert not is_empty(Conversation(({"role": "assistant", "content": "a"},), "f:1"))


# Split

prompts = st.lists(st.text("abcdefghij ", min_size=1, max_size=6), min_size=1, max_size=30)


@given(first=prompts, more=prompts, share=st.floats(0.05, 0.5))
def test_no_row_moves_when_data_grow(first, more, share):
    small = [pair(p, f"answer {p}") for p in dict.fromkeys(first)]
    large = list(reversed([pair(p, f"answer {p}") for p in dict.fromkeys([*first, *more])]))
    try:
        before, note_before = split(small, share)
        after, note_after = split(large, share)
    except DataError:
        return
    moved = [row for row, held in before.items() if after[row] != held]
    if note_before is None:
        assert note_after is None
        assert not moved
    elif "smallest hash" in note_before and "open with" not in note_before:
        # Tiny data: what was held out for want of others may go back, but nothing goes from training to validation.
        assert all(before[row] for row in moved)


def test_share_is_met():
    rows = [pair(f"question {i}", "a") for i in range(2000)]
    assert 150 < sum(split(rows, 0.1)[0].values()) < 250
    assert sum(split(rows, 0.0)[0].values()) == 0


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_tiny_data_have_both_splits(count):
    for start in range(30):
        held, _ = split([pair(f"{start} {i}", "a") for i in range(count)])
        assert 0 < sum(held.values()) < count


def test_same_question_is_on_one_side():
    rows = [pair(f"Question {i}?", answer) for i in range(50) for answer in ("yes", "no")]
    rows += [pair(f" question  {i}", "maybe") for i in range(50)]
    found = np.array([points(row) for row in rows])
    held, _ = choose_validation(found[:, 0], found[:, 1], 0.3)
    sides = {}
    for row, side in zip(rows, held, strict=True):
        sides.setdefault(tuple(words(row.opening)), set()).add(bool(side))
    assert len(sides) == 50
    assert all(len(side) == 1 for side in sides.values())


def test_one_instruction_for_all_rows_is_split_by_answers():
    held, note = split([pair("Write a haiku.", f"poem {i}") for i in range(100)])
    assert 0 < sum(held.values()) < 40
    assert "open with the same words" in note


def test_rows_that_are_all_alike_are_refused():
    with pytest.raises(DataError, match="All 2 rows are the same but for case"):
        split([text("Hello!"), text("hello")])


# Leaks

LONG = "the quick brown fox jumps over the lazy dog and runs away from the small house on the hill in the evening sun"


def test_exact_leaks_name_both_origins():
    found = find_leaks([pair("One  two", "three", "v:1"), pair("x", "y", "v:2")], [pair("one two", "Three", "t:9")])
    assert (found.exact, found.near, found.compared) == (1, 0, 2)
    assert found.examples[0].startswith("v:1 is also in training as t:9: ")


def test_near_duplicates_are_found_and_others_are_not():
    validation = [text(LONG, "v:1"), text("something else entirely is said in this one here", "v:2")]
    found = find_leaks(validation, [text(LONG + " again", "t:1"), text(LONG.upper() + "!", "t:2")])
    assert (found.exact, found.near) == (0, 1)
    assert "v:1" in found.examples[0]
    assert "(1.00)" in found.examples[0]  # the nearest one is named
    half = " ".join(LONG.split()[:12])
    assert find_leaks([text(LONG)], [text(half)]).near == 0


def test_near_duplicates_in_a_script_without_spaces():
    sentence = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    assert find_leaks([text(sentence)], [text(sentence[:-1] + "よ")]).near == 1
    assert (
        find_leaks([text(sentence)], [text("国境の長いトンネルを抜けると雪国であった。夜の底が白くなった。")]).near == 0
    )


def test_an_instruction_that_all_rows_share_does_not_make_them_alike():
    question = "Is this movie review positive or negative? Answer with one word and nothing else, please."
    nouns = words("sun moon star tree lake hill road bird fish rain snow wind fire sand wave leaf rock gate bell drum")
    rows = [pair(f"{question} {noun} {noun}s", "positive", f"r:{noun}") for noun in nouns]
    others = [pair(f"{question} new {noun}", "positive", "t") for noun in nouns]
    assert find_leaks(rows, others).near == 0


@given(
    st.lists(st.text("ab ", min_size=5, max_size=40), min_size=1, max_size=6), st.text("ab ", min_size=5, max_size=40)
)
def test_index_finds_exactly_the_similar_rows(held, probe):
    def grams(body):
        found = words(body)
        return {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))} if found else set()

    def is_near(body):
        union = grams(body) | grams(probe)
        return bool(union) and len(grams(body) & grams(probe)) / len(union) >= THRESHOLD

    normal = {body: " ".join(body.split()) for body in held}
    expected = sum(is_near(body) and normal[body] != " ".join(probe.split()) for body in held)
    found = find_leaks([text(body, f"v:{i}") for i, body in enumerate(held)], [text(probe, "t")])
    assert found.near == expected
