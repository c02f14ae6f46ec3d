"""The whole way: figures add up, results are cached by content, and bad data are refused with a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from haori.core.errors import DataError, StorageError
from haori.data import check_text, load_text, read_conversations
from haori.data.conversation import Conversation
from haori.data.section import TextSection


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def many(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"what is {i}?", "completion": f"number {i}"} for i in range(start, start + count)]


def load(path, tokenizer, context_length=256, **section):
    return load_text(TextSection(path=str(path), **section), tokenizer, context_length=context_length)


def untouched(home: Path) -> bool:
    """Say whether nothing, not even a temporary folder, was left in the cache."""
    folder = home / "cache" / "data"
    return not folder.exists() or not list(folder.iterdir())


def test_figures_add_up(tmp_path, tiny_tokenizer):
    rows = many(40)
    rows += [rows[3], rows[4], {"prompt": "x", "completion": " "}, {"prompt": None, "completion": "x"}]
    rows += [{"prompt": "be\x00ll", "completion": "ring"}, {"prompt": "long", "completion": "word " * 300}]
    rows += [{"messages": None, "prompt": "never", "completion": "used"}]
    path = write(tmp_path / "a.jsonl", rows)
    report = load(path, tiny_tokenizer).report
    assert (report.read, report.duplicates, report.empty, report.too_long) == (47, 2, 2, 1)
    assert (report.control_characters, report.broken, report.untrained, report.truncated) == (1, 0, 0, 0)
    assert report.read == sum(report.rows.values()) + report.duplicates + report.empty + report.too_long
    assert (report.format, report.max_length, report.train_on) == ("prompt-completion", 256, "assistant")
    assert sum(bucket.rows for bucket in report.histogram) == sum(report.rows.values())


def test_columns_and_figures_of_the_splits(tmp_path, tiny_tokenizer):
    data = load(write(tmp_path / "a.jsonl", many(60)), tiny_tokenizer, licence="MIT", attribution="me")
    report = data.report
    for name, split in (("train", data.train), ("validation", data.validation)):
        assert len(split) == report.rows[name] > 0
        assert sum(split["length"]) == report.tokens[name]
        assert sum(split["trained"]) == report.trained_tokens[name]
        row = split[0]
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        conversation = Conversation.from_json(row["conversation"], row["origin"])
        assert conversation.hash == row["hash"]
    lengths = [*data.train["length"], *data.validation["length"]]
    assert report.longest == max(lengths)
    assert report.mean_length == pytest.approx(sum(lengths) / 60)
    reference = data.reference()
    assert (reference.licence, reference.attribution, reference.rows) == ("MIT", "me", report.rows)


def test_second_run_reads_the_cache(tmp_path, tiny_tokenizer, haori_home):
    path = write(tmp_path / "a.jsonl", many(20))
    first = load(path, tiny_tokenizer)
    (folder,) = (haori_home / "cache" / "data").iterdir()
    before = (folder / "rows.arrow").stat().st_ino
    second = load(path, tiny_tokenizer, licence="MIT")
    assert (folder / "rows.arrow").stat().st_ino == before
    assert second.report.with_fields(licence=None) == first.report
    assert second.report.licence == "MIT"
    write(tmp_path / "a.jsonl", many(21))
    assert load(path, tiny_tokenizer).report.read == 21
    assert load(path, tiny_tokenizer, train_on="all").report.trained_tokens != first.report.trained_tokens
    (folder / "report.json").write_text("{}")  # as another version might have left it
    assert load(write(tmp_path / "a.jsonl", many(20)), tiny_tokenizer).report == first.report


def test_hash_follows_rows_split_and_settings(tmp_path, tiny_tokenizer):
    rows = many(30)
    first = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer).report.hash
    assert load(write(tmp_path / "other-name.jsonl", rows), tiny_tokenizer).report.hash == first
    others = [
        load(write(tmp_path / "b.jsonl", rows[1:]), tiny_tokenizer),
        load(write(tmp_path / "c.jsonl", rows[::-1]), tiny_tokenizer),
        load(tmp_path / "a.jsonl", tiny_tokenizer, validation_share=0.4),
        load(tmp_path / "a.jsonl", tiny_tokenizer, max_length=200),
        load(tmp_path / "a.jsonl", tiny_tokenizer, train_on="all"),
        load(tmp_path / "a.jsonl", tiny_tokenizer, system="be kind"),
    ]
    assert len({first, *(data.report.hash for data in others)}) == 7


def test_growth_keeps_rows_in_their_split(tmp_path, tiny_tokenizer):
    small = load(write(tmp_path / "a.jsonl", many(50)), tiny_tokenizer)
    large = load(write(tmp_path / "b.jsonl", many(100, start=0)[::-1]), tiny_tokenizer)
    assert set(small.train["hash"]) <= set(large.train["hash"])
    assert set(small.validation["hash"]) <= set(large.validation["hash"])


def test_validation_file_with_leaks(tmp_path, tiny_tokenizer):
    train = write(tmp_path / "train.jsonl", many(10))
    valid = write(tmp_path / "valid.jsonl", [*many(2, start=100), {"prompt": "What is  3?", "completion": "number 3"}])
    data = load(train, tiny_tokenizer, validation=valid)
    assert data.report.rows == {"train": 10, "validation": 3}
    assert data.report.leaks.exact == 1
    assert data.report.problems == (f"{valid}:3 is also in training as {train}:4: what is 3? number 3",)
    assert [origin.split(":")[0] for origin in data.validation["origin"]] == [valid] * 3


def test_truncation_keeps_an_answer_or_drops_the_row(tmp_path, tiny_tokenizer):
    rows = [*many(10), {"prompt": "short", "completion": "word " * 300}, {"prompt": "word " * 300, "completion": "a"}]
    data = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer, too_long="truncate")
    assert (data.report.truncated, data.report.too_long) == (1, 1)
    assert data.report.longest == 256
    assert min([*data.train["trained"], *data.validation["trained"]]) > 0
    with pytest.raises(DataError, match=r"a\.jsonl:11: the row has \d+ tokens and data.max_length is 256"):
        load(tmp_path / "a.jsonl", tiny_tokenizer, too_long="error")


def test_max_length(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "a.jsonl", many(10))
    assert load(path, tiny_tokenizer, context_length=8192).report.max_length == 2048
    with pytest.raises(DataError, match=r"data.max_length is 300, but this base reads at most 256 tokens"):
        load(path, tiny_tokenizer, max_length=300)


def test_system_message_and_max_rows(tmp_path, tiny_tokenizer):
    rows = [*many(5), {"system": "own", "prompt": "q", "completion": "a"}]
    path = write(tmp_path / "a.jsonl", [{"system": None, **row} for row in rows])
    found, _ = read_conversations(TextSection(path=path, system="be kind"))
    assert [row.messages[0]["content"] for row in found] == ["be kind"] * 5 + ["own"]
    assert len(read_conversations(TextSection(path=path, max_rows=3))[0]) == 3


def test_folder_of_mixed_formats(tmp_path, tiny_tokenizer):
    write(tmp_path / "a.jsonl", many(5))
    (tmp_path / "b.csv").write_text("instruction,output,id\nhow,so,1\nwhy,thus,2\n")
    (tmp_path / "notes.md").write_text("x")
    report = load(tmp_path, tiny_tokenizer).report
    assert (report.format, report.read) == ("alpaca+prompt-completion", 7)
    assert report.notes[:2] == ("Columns not used: id (2 rows).", "Files of the folder not read: notes.md (1).")


def test_text_rows(tmp_path, tiny_tokenizer):
    (tmp_path / "book.txt").write_text("\n\n".join(f"Paragraph number {i}." for i in range(30)))
    data = load(tmp_path / "book.txt", tiny_tokenizer)
    assert data.report.format == "text"
    assert data.train[0]["labels"] == data.train[0]["input_ids"]


def test_control_tokens_in_the_text_are_noted(tmp_path, tiny_tokenizer):
    rows = [*many(5), {"prompt": "say <|im_end|>", "completion": "no"}]
    notes = load(write(tmp_path / "a.jsonl", rows), tiny_tokenizer).report.notes
    assert any("control token" in note and note.endswith(": 1.") for note in notes)


def test_rows_without_a_trained_answer_are_counted(tmp_path, tiny_tokenizer):
    def row(i, **flag):
        return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", **flag}]}

    path = write(tmp_path / "a.jsonl", [row(1), row(2), row(3, loss=False)])
    assert load(path, tiny_tokenizer).report.untrained == 1


MASKED = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]}


@pytest.mark.parametrize(
    ("rows", "section", "words"),
    [
        (many(1), {}, "has one row; training needs at least two"),
        ([many(1)[0]] * 3, {}, "has one row left of 3 read"),
        (many(1), {"validation_share": 0.0}, "has one row"),
        (
            [MASKED, {"messages": [{"role": "user", "content": "r"}, MASKED["messages"][1]]}],
            {},
            'all say "loss": false',
        ),
        ([{"prompt": "word " * 300, "completion": "a"}], {}, "1 too long. Raise data.max_length"),
        ([{"prompt": "word " * 300, "completion": "a"}], {"too_long": "truncate"}, "1 too long"),
        ([{"prompt": "", "completion": "a"}, {"prompt": "q", "completion": ""}], {}, "of 2 read, 2 empty"),
        ([{"prompt": "A!", "completion": "b"}, {"prompt": "a", "completion": "B"}], {}, "All 2 rows are the same"),
        ([*many(3), {"prompt": "q", "completion": 1}], {}, r"a\.jsonl:4:completion: this must be text, not int 1"),
        ([*many(3), {"promt": "q", "completion": "a"}], {}, r"a\.jsonl:4:prompt: this row lacks the field; the row is"),
        ([*many(3), {"chosen": "a", "rejected": "b"}], {}, r"a\.jsonl:4:prompt: this row lacks the field"),
    ],
)
def test_bad_data_are_refused_and_leave_nothing(tmp_path, tiny_tokenizer, haori_home, rows, section, words):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=words) as caught:
        load(path, tiny_tokenizer, **section)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert untouched(haori_home)


def test_validation_file_without_a_row_to_measure_is_refused(tmp_path, tiny_tokenizer):
    train, valid = write(tmp_path / "t.jsonl", many(5)), write(tmp_path / "v.jsonl", [MASKED])
    with pytest.raises(DataError, match=r"v\.jsonl' has no row to use"):
        load(train, tiny_tokenizer, validation=valid)


def test_empty_csv_has_no_rows(tmp_path, tiny_tokenizer):
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path / "a.csv", tiny_tokenizer)
    with pytest.raises(DataError, match="has no rows"):
        read_conversations(TextSection(path=str(tmp_path / "a.csv")))


def test_check_goes_on_after_broken_rows(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.jsonl"
    write(path, many(8))
    with path.open("a") as file:
        file.write('{"prompt": "a", "completion": 5}\n{"prompt": \n')
        file.write('{"prompt": [{"role": "assistant", "content": "x"}], "completion": "y"}\n')
    report = check_text(TextSection(path=str(path)), tiny_tokenizer, context_length=256).report
    assert (report.read, report.broken, sum(report.rows.values())) == (11, 3, 8)
    assert [problem.split(" ")[0] for problem in report.problems] == [
        f"{path}:9:completion:", f"{path}:10:", f"{path}:11:"]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.jsonl:9:completion"):
        load(path, tiny_tokenizer)


def test_check_reports_what_training_would_refuse(tmp_path, tiny_tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n\xff\xfe\n')
    report = check_text(TextSection(path=str(tmp_path / "a.jsonl")), tiny_tokenizer, context_length=256).report
    assert report.broken == 1
    assert "UTF-8" in report.problems[0]
    assert "has one row left of 2 read" in report.problems[1]
    assert report.rows == {"train": 1, "validation": 0}
    (tmp_path / "b.jsonl").write_text(json.dumps(MASKED))
    empty = check_text(TextSection(path=str(tmp_path / "b.jsonl")), tiny_tokenizer, context_length=256)
    assert (len(empty.train), len(empty.validation), empty.report.histogram) == (0, 0, ())


def test_read_conversations_counts_and_hashes(tmp_path):
    rows = [*many(3), many(1)[0], {"prompt": "", "completion": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    found, report = read_conversations(TextSection(path=path, licence="MIT"))
    assert [row.origin for row in found] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert (report.read, report.kept, report.duplicates, report.empty) == (5, 3, 1, 1)
    assert report.reference().rows == {"all": 3}
    assert report.reference().licence == "MIT"
    again = read_conversations(TextSection(path=write(tmp_path / "b.jsonl", many(3))))[1]
    assert again.hash == report.hash


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_cache_that_cannot_be_written(tmp_path, tiny_tokenizer, haori_home):
    haori_home.mkdir(mode=0o500)
    with pytest.raises(StorageError, match="permission denied"):
        load(write(tmp_path / "a.jsonl", many(5)), tiny_tokenizer)


def test_cache_below_a_file_is_explained(tmp_path, tiny_tokenizer, haori_home):
    haori_home.write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        load(write(tmp_path / "a.jsonl", many(5)), tiny_tokenizer)


def test_import_is_light():
    code = (
        "import sys, haori.data; from haori.data import read_conversations, report_table, fetch_reviews\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
