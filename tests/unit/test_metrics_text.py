"""Metrics of text against sacrebleu."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haori.metrics import text

texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", ",", "film!"]), max_size=9).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


def test_exact_match_normalises() -> None:
    answers = ["Ｙｅｓ.", " two\n words ", "no", "no!"]
    assert text.exact_match(answers, ["yes", "two words", "yes", "no"]).tolist() == [True, True, False, False]


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_bleu_and_chrf_sums_equal_sacrebleu(rows) -> None:
    answers, references = map(list, zip(*rows, strict=True))
    assert text.bleu_sums(answers, references).value == pytest.approx(text.bleu(answers, references).value)
    assert text.chrf_sums(answers, references).value == pytest.approx(text.chrf(answers, references).value)


def test_bleu_is_sacrebleus_own_number_and_names_its_settings() -> None:
    import sacrebleu

    answers = ["The cat sat on the mat.", "A film that is worth seeing"]
    references = ["The cat sat on a mat.", "A film worth seeing twice"]
    found = text.bleu(answers, references)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert 0 < found.value < 100
    assert "tok:13a" in found.signature and "version:" in found.signature
    assert text.chrf(answers, references).value == pytest.approx(sacrebleu.corpus_chrf(answers, [references]).score)


def test_bleu_counts_characters_where_words_have_no_spaces() -> None:
    found = text.bleu(["今日は天気が良いですね"], ["今日は天気が良いです"])
    assert "tok:char" in found.signature
    assert found.value > 50
