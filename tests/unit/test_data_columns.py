"""All rows decide which columns there are, and what is there and unused is counted: columns, message fields, flags."""

import json

import pytest

from haori.core.errors import DataError
from haori.data import check_text, load_text, read_conversations
from haori.data.columns import survey
from haori.data.readers import RawRow
from haori.data.section import Columns, TextSection

CLASSIFY = [{"instruction": "Say hello.", "output": "Hello."}] + [
    {"instruction": "Classify the review.", "input": f"Review number {i} was {word}", "output": label}
    for i in range(20)
    for word, label in (("awful", "negative"), ("fine", "positive"))
]


def write_kind(folder, rows, kind):
    """Write rows as one kind of file; kinds with a header hold nulls or blanks where a row lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"data.{kind}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if kind == "tsv" else ",", restval="")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def read(folder, rows, kind="jsonl", **section):
    return read_conversations(TextSection(path=write_kind(folder, rows, kind), **section))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_an_optional_column_missing_in_the_first_row_is_used(tmp_path, kind):
    found, report = read(tmp_path, CLASSIFY, kind)
    assert (report.read, report.kept, report.duplicates) == (41, 41, 0)
    assert found[0].messages[0]["content"] == "Say hello."
    assert found[1].messages[0]["content"] == "Classify the review.\n\nReview number 0 was awful"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_late_system_column_is_used(tmp_path, kind):
    rows = [{"prompt": "Say hello.", "completion": "Hello."}]
    rows += [{"system": "Answer as a pirate.", "prompt": f"Question {i}", "completion": f"Arr {i}"} for i in range(3)]
    found, _ = read(tmp_path, rows, kind)
    assert [row.messages[0]["role"] for row in found] == ["user", "system", "system", "system"]


def test_the_order_of_rows_changes_nothing(tmp_path):
    first, second = (read(tmp_path, rows)[0] for rows in (CLASSIFY, CLASSIFY[::-1]))
    assert {row.hash for row in first} == {row.hash for row in second}


def test_late_history_and_other_systems_are_used(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "history": [["h", "i"]]}]
    assert len(read(tmp_path, rows)[0][1].messages) == 4
    rows = [{"question": "a", "response": "b"}, {"system_prompt": "s", "question": "c", "response": "d"}]
    assert read(tmp_path, rows)[0][1].messages[0] == {"role": "system", "content": "s"}


def test_rows_that_spell_a_column_differently_are_read_alike(tmp_path):
    rows = [{"Prompt": "a", "completion": "b"}, {"prompt": "c", "Completion ": "d"}, {"prompt": "e", "completion": "f"}]
    assert [row.messages[0]["content"] for row in read(tmp_path, rows)[0]] == ["a", "c", "e"]
    with pytest.raises(DataError, match="there twice, also as 'Prompt'"):
        read(tmp_path, [*rows, {"prompt": "x", "Prompt": "y", "completion": "z"}])


def test_columns_that_are_null_throughout_are_no_columns(tmp_path):
    rows = [{"messages": None, "text": "", "prompt": f"q{i}", "completion": f"a{i}", "meta": None} for i in range(3)]
    for kind in ("jsonl", "parquet"):
        found, report = read(tmp_path, rows, kind)
        assert (report.format, len(found), report.notes) == ("prompt-completion", 3, ())
    rows = [{"instruction": None, "input": "q", "output": "a"}]
    assert read(tmp_path, rows)[0][0].messages[0]["content"] == "q"
    with pytest.raises(DataError, match="of 1 read, 1 empty"):
        read(tmp_path, [{"prompt": None, "completion": None}])


def test_a_row_of_another_format_is_refused_not_dropped(tmp_path):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=r"data\.jsonl:2:messages: the file is read as messages.* is prompt-completion"):
        read(tmp_path, [chat, {"messages": None, "prompt": "q", "completion": "a"}])


def test_preference_pairs_are_found_wherever_they_begin(tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    with pytest.raises(DataError, match="holds preference pairs"):
        read(tmp_path, [{"prompt": "q", "completion": "a"}, *pairs])


def test_unused_columns_are_reported_with_their_rows(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    rows[1] |= {"id": 1}
    rows[3] |= {"id": 3, "tags": ["x"], "blank": ""}
    for section in ({}, {"columns": Columns(prompt="prompt", completion="completion")}):
        notes = read(tmp_path, rows, **section)[1].notes
        assert notes == ("Columns not used: id (2 rows), tags (1 row).",)


def test_unknown_fields_of_messages_are_reported(tmp_path):
    def row(i, **fields):
        return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", **fields}]}

    rows = [row(0), row(1, name="x", weight=None), row(2, name="y", score=0.5, refusal=None)]
    part = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    rows.append({"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "b"}]})
    expected = (
        "Fields of messages not used: content[].cache_control (1 message), name (2 messages), score (1 message).",
    )
    assert read(tmp_path, rows)[1].notes == expected
    assert read(tmp_path, rows[:3], "parquet")[1].notes == (
        "Fields of messages not used: name (2 messages), score (1 message).",)  # fmt: skip


def test_near_names_are_other_names(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, [{"instruction": "q", "Outptu": "a"}])
    assert "'Outptu' is near 'output'" in str(caught.value)
    assert "'instruction' is near" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "q", "response": "a"}, "q"),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "q\n\nc"),
        ({"instruction": "q", "context": "", "response": "a"}, "q"),
    ],
)
def test_instruction_with_response_is_understood(tmp_path, row, asked):
    found, report = read(tmp_path, [row])
    assert (report.format, found[0].messages[0]["content"]) == ("alpaca", asked)


def test_survey_counts_what_rows_hold():
    rows = [RawRow("f:1", "f", {"a": 1, "b": None}), RawRow("f:2", "f", {"a": 0, "c": "x"}), RawRow("g:1", "g", {})]
    found = survey([*rows, RawRow("f:3", "f", {"z": 1}, problem=DataError("x"))])
    assert (found["f"].rows, found["f"].held, found["g"].held) == (2, {"a": 2, "b": 0, "c": 1}, {})


EMPTY = [
    {"messages": [{"role": "user", "content": f"Q {i}"}, {"role": "assistant", "content": blank},
                  {"role": "user", "content": "again?"}, {"role": "assistant", "content": f"A {i}"}]}
    for i, blank in enumerate(["", " \n", "", "\t", "", ""])
]  # fmt: skip


def test_an_empty_answer_is_reported_and_not_trained(tmp_path, tiny_tokenizer):
    section = TextSection(path=write_kind(tmp_path, EMPTY, "jsonl"))
    data = check_text(section, tiny_tokenizer, context_length=256)
    assert sum(data.report.rows.values()) == 6
    assert data.report.problems[0].endswith("data.jsonl:1: turn 2, the assistant's, has no text.")
    assert len(data.report.problems) == 6
    note = "Turns of the assistant without text, kept as context and not trained: 6."
    assert note in data.report.notes
    trained = load_text(section, tiny_tokenizer, context_length=256)
    assert note in trained.report.notes
    for row in [*trained.train, *trained.validation]:
        learnt = tiny_tokenizer.decode(
            [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0]
        )
        assert learnt == f"{json.loads(row['conversation'])['messages'][-1]['content']}<|im_end|>"
    assert note in read_conversations(section)[1].notes


def test_an_empty_question_is_reported(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
                          {"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}]  # fmt: skip
    report = read(tmp_path, rows)[1]
    assert report.notes == ("Turns of the user without text, kept as they are: 1.",)
    assert report.problems[0].endswith("data.jsonl:1: turn 3, the user's, has no text.")
