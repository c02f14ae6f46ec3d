"""Labelled rows: forms, labels, what is dropped and said, the split, and words on their tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from haori.bases import find_base, load_skeleton, load_tokenizer
from haori.core.errors import DataError
from haori.tasks.classification.encoding import TextEncoder, first_tokens, longest_input
from haori.tasks.classification.label_names import order_labels
from haori.tasks.classification.recipe import ClassificationData
from haori.tasks.classification.rows import ClassificationSplit, load_rows
from haori.tasks.classification.splitting import choose_stratified
from tests.classification_samples import animals, write_csv, write_jsonl
from tests.classifier_models import build_classifier_base


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return build_classifier_base("bert", tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="module")
def tokenizer(bert):
    return load_tokenizer(find_base(str(bert)))


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(rows: Any, *, max_length: int = 32, tolerant: bool = False, **keys: Any) -> ClassificationSplit:
        path = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "rows.jsonl", rows)
        section = ClassificationData.model_validate({"path": str(path), **keys})
        return load_rows(section, TextEncoder(tokenizer, max_length), embeddings=None, tolerant=tolerant)

    return load


def texts(split: ClassificationSplit) -> dict[str, list[str]]:
    """The labels of every row by its text."""
    found = {}
    for part in (split.train, split.validation):
        for row in part:
            found[json.loads(row["row"])["text"]] = row["labels"]
    return found


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    """Different texts, of labels a and b in turn."""
    return [{**row, "label": "ab"[place % 2], **more} for place, row in enumerate(animals(count))]


@pytest.mark.parametrize(
    ("text", "label"),
    [("text", "label"), ("Sentence", "Sentiment"), ("review", "category"), ("content", "LABELS"), ("tweet", "emotion")],
)
def test_text_and_label_are_found_by_their_names(text, label, load):
    split = load([{text: row["text"], label: row["label"], "id": 5} for row in animals(30)])
    assert split.labels == ("cat", "dog", "other")
    assert split.problem == "single_label"
    assert texts(split) == {row["text"]: [row["label"]] for row in animals(30)}
    assert any("Columns not used: id" in note for note in split.notes)


def test_csv_parquet_and_mapped_columns_give_the_same(load, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = animals(30)
    wanted = texts(load(rows))
    assert texts(load(write_csv(tmp_path / "rows.csv", rows))) == wanted
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert texts(load(tmp_path / "rows.parquet")) == wanted
    other = [{"a": row["text"], "b": row["label"]} for row in rows]
    assert texts(load(other, columns={"text": "a", "label": "b"})) == wanted


def test_rows_of_text_generation_are_read_with_the_answer_as_label(load):
    asked = [{"prompt": row["text"], "completion": row["label"]} for row in animals(30)]
    assert texts(load(asked)) == texts(load(animals(30)))
    chat = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": row["text"]},
                      {"role": "assistant", "content": row["label"]}]}
        for row in animals(30)
    ]  # fmt: skip
    assert texts(load(chat)) == texts(load(animals(30)))
    chat[3]["messages"] = chat[3]["messages"] + chat[3]["messages"][1:]
    with pytest.raises(DataError, match=r"rows.jsonl:4:messages: a classifier learns from one question"):
        load(chat)


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "passage")])
def test_pairs_are_encoded_as_the_tokenizer_does(names, load, tokenizer):
    first, second = names
    rows = [{first: row["text"], second: "the cat sat", "label": row["label"]} for row in animals(30)]
    split = load(rows)
    for row in split.train:
        text = json.loads(row["row"])
        wanted = tokenizer(text["text"], text["pair"])
        assert (row["input_ids"], row["token_type_ids"]) == (wanted["input_ids"], wanted["token_type_ids"])
        assert 1 in row["token_type_ids"]


def test_a_pair_without_a_separator_of_the_tokenizer_is_parted_by_a_line_break(tmp_path):
    llama = load_tokenizer(find_base(str(build_classifier_base("llama", tmp_path / "llama"))))
    encoder = TextEncoder(llama, 32)
    assert encoder.encode("one", "two").input_ids == llama("one\ntwo")["input_ids"]


def test_numbers_are_named_by_the_recipe_and_by_the_dataset(load, tmp_path):
    import datasets

    rows = [{"text": row["text"], "label": number % 3} for number, row in enumerate(animals(40))]
    assert load(rows).labels == ("0", "1", "2")
    named = load(rows, labels=("x", "y", "z"))
    assert named.labels == ("x", "y", "z")
    assert texts(named)[rows[4]["text"]] == ["y"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "y", "x"])}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "named.parquet"))
    split = load(tmp_path / "named.parquet")
    assert split.labels == ("z", "y", "x")
    assert texts(split)[rows[4]["text"]] == ["y"]


def test_labels_are_ordered_by_number_or_name_with_outside_first():
    assert order_labels({"10", "9", "-1"}) == ("-1", "9", "10")
    assert order_labels({"b", "a"}) == ("a", "b")
    assert order_labels({"I-PER", "B-PER", "O", "B-LOC"}) == ("O", "B-LOC", "B-PER", "I-PER")


def test_several_labels_come_as_lists_columns_or_a_separated_text(load):
    rows = [{"text": row["text"], "labels": ["b", "a"][: number % 3]} for number, row in enumerate(animals(40))]
    lists = load(rows)
    assert (lists.problem, lists.labels) == ("multi_label", ("a", "b"))
    assert texts(lists)[rows[2]["text"]] == ["a", "b"] and texts(lists)[rows[0]["text"]] == []
    columns = [{"text": r["text"], "a": int("a" in r["labels"]), "b": "b" in r["labels"]} for r in rows]
    assert texts(load(columns, columns={"text": "text", "labels": ("a", "b")})) == texts(lists)
    joined = [{"text": r["text"], "labels": "; ".join(r["labels"])} for r in rows]
    split = load(joined, label_separator=";")
    assert split.problem == "multi_label"
    assert texts(split) == {text: labels for text, labels in texts(lists).items() if labels}
    assert load(joined).problem == "single_label"  # only if it is asked for
    columns[4]["b"] = 2
    with pytest.raises(DataError, match=r"rows.jsonl:5:b: this must be 1 where the label holds"):
        load(columns, columns={"text": "text", "labels": ("a", "b")})


def test_words_carry_their_labels_on_their_first_tokens(load):
    sentences = [row["text"].split() for row in animals(30)]
    tags = [["B-CAT" if word == "cat" else "O" for word in words] for words in sentences]
    split = load([{"tokens": words, "ner_tags": named} for words, named in zip(sentences, tags, strict=True)])
    assert (split.problem, split.labels) == ("token", ("O", "B-CAT"))
    row = split.train[0]
    found = json.loads(row["row"])
    assert row["labels"][0] is None and row["labels"][-1] is None  # [CLS] and [SEP]
    assert row["labels"][1:-1] == found["labels"]


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2", "deberta"])
def test_first_tokens_agree_with_the_word_ids_of_the_tokenizer(name, tmp_path):
    tokenizer = load_tokenizer(find_base(str(build_classifier_base(name, tmp_path / name))))
    words = ["the", "quickly-running", "x", "New York", "cat", "\u732b", "sings"]
    found = TextEncoder(tokenizer, 64).encode(" ".join(words), None, words)
    offsets = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    place = 0
    for word, token in zip(words, found.first_of, strict=True):
        begin = " ".join(words).index(word, place)
        place = begin + len(word)
        assert token is not None
        start, end = offsets[token]
        assert start <= begin < end or start == begin  # the token holds the word's first character
        if token:
            assert offsets[token - 1][1] <= begin


def test_a_word_without_tokens_has_no_first():
    assert first_tokens(["a", "", "b"], [(0, 0), (0, 1), (3, 4), (0, 0)]) == (1, None, 2)
    assert first_tokens(["a", "b"], [(0, 1)]) == (0, None)


def test_long_rows_are_cut_dropped_or_refused_and_counted(load):
    rows = [*numbered(20), {"text": "the cat sat on the mat " * 9, "label": "a"}]
    cut = load(rows)
    assert (cut.report.truncated, cut.report.longest) == (1, 32)
    assert any("cut: 1" in note for note in cut.notes)
    dropped = load(rows, too_long="drop")
    assert (dropped.report.too_long, sum(dropped.report.rows.values())) == (1, 20)
    with pytest.raises(DataError, match=r"rows.jsonl:21: the row has more than 32 tokens"):
        load(rows, too_long="error")


def test_every_row_is_accounted_for(load):
    added = [(" ", "a"), ("the bird sings", None), ("the bird sings", ""), ("a\u0000 cat here", "a")]
    rows = [*numbered(20), *({"text": text, "label": label} for text, label in added), numbered(20)[3]]
    report = load(rows).report
    assert (report.read, report.empty, report.duplicates, report.control_characters) == (25, 3, 1, 1)
    assert sum(report.rows.values()) == report.read - report.empty - report.duplicates
    assert report.dropped == "3 without text or label, 1 exact duplicates (16% of the rows read)"


def test_texts_with_other_labels_are_kept_and_said(load):
    rows = [*numbered(20), {**numbered(20)[0], "label": "b"}]
    split = load(rows)
    assert sum(split.report.rows.values()) == 21
    assert any(
        "came before with another label, all kept: 1" in note and "rows.jsonl:21" in note for note in split.notes
    )


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "every row has the label 'x'"),
        ([{"text": "a", "label": "x"}], {}, "one row to use"),
        ([{"words": "a", "kind": "x"}], {}, r"columns 'words', 'kind': no text with a label"),
        ([{"text": "a", "label": 0.5}], {}, r"rows.jsonl:1:label: a label is a name or a whole number, not 0.5"),
        ([{"text": 5, "label": "x"}], {}, r"rows.jsonl:1:text: this must be text, not int 5"),
        ([{"text": "a", "label": ["x", " "]}], {}, "one of the labels in this list is blank"),
        ([{"text": "a", "label": ["x", "y"]}], {"problem": "single_label"}, "2 labels, but data.problem"),
        ([{"text": "a", "label": "x"}], {"problem": "token"}, "no tokens with tags"),
        ([{"tokens": ["a"], "tags": ["x", "y"]}], {}, r"a label for each of 1 words, not 2"),
        ([{"tokens": ["a"], "tags": [""]}], {}, "a word has no label"),
        ([{"tokens": ["a"], "tags": ["x"]}], {"problem": "multi_label"}, "columns 'tokens', 'tags'"),
        ([{"text": "a", "label": "goood"}], {"labels": ("good", "bad")}, "did you mean 'good'"),
        ([{"text": "a", "label": 7}], {"labels": ("good", "bad")}, "does not have the label '7'"),
        ([{"text": "a", "label": "x"}], {"columns": {"text": "txt", "label": "label"}}, "did you mean 'text'"),
        ([{"text": "a", "label": "x"}], {"columns": {"text": "text"}}, "must name text and label"),
    ],
)  # fmt: skip
def test_mistakes_get_a_sentence(rows, keys, said, load):
    with pytest.raises(DataError, match=said):
        load(rows, **keys)


def test_a_column_of_texts_taken_for_labels_is_refused(load):
    rows = [{"text": row["text"], "label": f"{row['text']} {number}"} for number, row in enumerate(animals(60))]
    with pytest.raises(DataError, match="this looks like text"):
        load(rows)


def test_a_check_goes_on_after_broken_rows(load):
    rows = [*numbered(20), {"text": 5, "label": "a"}]
    split = load(rows, tolerant=True)
    assert (split.report.broken, len(split.report.problems), split.refused) == (1, 1, False)
    only = load([{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], tolerant=True)
    assert only.refused and "nothing to tell apart" in only.report.problems[0]


def test_labels_of_validation_must_be_in_training(load, tmp_path):
    write_jsonl(tmp_path / "held.jsonl", [{"text": "the red bird", "label": "c"}, {"text": "a mat", "label": "a"}])
    with pytest.raises(DataError, match=r"labels that no training row has: 'c' \(1\)"):
        load(numbered(20), validation=str(tmp_path / "held.jsonl"))
    split = load(numbered(20), validation=str(tmp_path / "held.jsonl"), labels=("a", "b", "c"))
    assert split.labels == ("a", "b", "c")
    assert any("Labels in no training row: 'c'" in note for note in split.notes)
    assert (len(split.train), len(split.validation)) == (20, 2)


def test_a_label_that_occurs_once_is_said(load):
    split = load([*numbered(40), {"text": "the red bird sleeps", "label": "once"}], validation_share=0.0)
    assert any("single training row: 'once'" in note for note in split.notes)


def test_leaks_are_found_by_text_whatever_the_label(load, tmp_path):
    text = "the small red bird sings and then the large dog ran under the tree"
    write_jsonl(tmp_path / "held.jsonl", [{"text": text, "label": "a"}, {"text": "a mat", "label": "b"}])
    split = load([*numbered(20), {"text": text.upper(), "label": "b"}], validation=str(tmp_path / "held.jsonl"))
    assert split.report.leaks.exact == 1
    assert any("1 rows that training has too" in note for note in split.notes)


def test_adding_rows_moves_no_other_row(load):
    few, more = load(numbered(150)), load([*numbered(150), *animals(150, seed=9)])
    assert len(few.validation) > 3
    for part in ("train", "validation"):
        assert set(getattr(few, part)["hash"]) <= set(getattr(more, part)["hash"])


def test_every_label_is_on_both_sides_where_it_has_rows_enough():
    import numpy as np

    points = np.linspace(0.02, 0.98, 40)
    labels = [("rare",) if 20 <= place < 26 else ("low",) if place < 2 else ("most",) for place in range(40)]
    held, notes = choose_stratified(points, labels, 0.1)
    assert held[20] and held.sum() == 1 + (points < 0.1).sum() - 1  # low: of 2 rows held out one goes back
    assert not held[1] and held[0]
    assert [line for line in notes if "'rare'" in line] and [line for line in notes if "'low'" in line]
    everywhere, none = choose_stratified(points, [("most",)] * 40, 0.1)
    assert (everywhere == (points < 0.1)).all() and none == []


def test_the_result_is_kept_and_a_changed_file_is_read_again(load, tmp_path):
    first = load(numbered(20))
    again = load(numbered(20))
    assert first.train._fingerprint == again.train._fingerprint
    assert first.report == again.report
    assert load(numbered(21)).report.hash != first.report.hash


def test_roberta_keeps_places_for_padding(tmp_path):
    for name, kept in (("roberta", 1), ("bert", 0), ("llama", 0)):
        base = find_base(str(build_classifier_base(name, tmp_path / name)))
        tokenizer = load_tokenizer(base)
        tokenizer.model_max_length = int(1e30)
        assert longest_input(load_skeleton(base), tokenizer, base.context_length) == base.context_length - kept
