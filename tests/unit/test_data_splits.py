"""A folder or hub dataset with splits is read as what it is; what is for testing is never trained on."""

import json
from pathlib import Path

import pytest

from haori.core.errors import DataError
from haori.data import check_text, load_text, read_conversations
from haori.data.section import TextSection
from haori.data.splits import kind_of, splits_of_folder
from haori.tasks.recipe import recipe_from


def rows(what: str, count: int = 6) -> list[dict]:
    return [{"prompt": f"{what} question {i}", "completion": f"{what} answer {i}"} for i in range(count)]


def put(folder: Path, name: str, what: str) -> None:
    """Write rows that say what they are, as the kind of file that the name ends in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    found = rows(what)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found))
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in found))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


def make(folder: Path, files: dict[str, str]) -> str:
    for name, what in files.items():
        put(folder, name, what)
    return str(folder)


def said(split) -> set[str]:
    """Return the first words of the rows of a split: what their files were for."""
    return {json.loads(row["conversation"])["messages"][0]["content"].split()[0] for row in split}


def load(path: str, tokenizer, **section):
    return load_text(TextSection(path=path, **section), tokenizer, context_length=256)


LAYOUTS = [
    {"data/train.jsonl": "train", "data/validation.jsonl": "validation", "data/test.jsonl": "test"},
    {"Train.csv": "train", "VAL.csv": "validation", "Test.csv": "test"},
    {"train/a.jsonl": "train", "train/b.json": "train", "dev/a.jsonl": "validation", "test/a.jsonl": "test"},
    {"data/train-00000-of-00002.parquet": "train", "data/train-00001-of-00002.parquet": "train",
     "data/validation-00000-of-00001.parquet": "validation", "data/test-00000-of-00001.parquet": "test"},
    {"default/train/0000.parquet": "train", "default/valid/0000.parquet": "validation",
     "default/testing/0000.parquet": "test"},
    {"my_train.jsonl": "train", "my-dev-1.jsonl": "validation", "my.test2.jsonl": "test", "eval.jsonl": "test"},
]  # fmt: skip


@pytest.mark.parametrize("files", LAYOUTS)
def test_layouts_are_read_as_what_they_are(tmp_path, tiny_tokenizer, files):
    path = make(tmp_path / "repo", files)
    data = load(path, tiny_tokenizer)
    assert (said(data.train), said(data.validation)) == ({"train"}, {"validation"})
    (note,) = [note for note in data.report.notes if note.startswith("Read ")]
    taken, left = note.split("; not read: ")
    for name, what in files.items():
        assert name in (left if what == "test" else taken)
    found, report = read_conversations(TextSection(path=path))
    assert {row.messages[0]["content"].split()[0] for row in found} == {"test"}
    assert report.notes[0].startswith("Read test (")


def test_without_a_validation_split_some_rows_are_held_out(tmp_path, tiny_tokenizer):
    path = make(tmp_path / "r", {"train.jsonl": "train", "test.jsonl": "test"})
    data = load(path, tiny_tokenizer)
    assert said(data.train) == said(data.validation) == {"train"}


def test_files_of_no_split_are_trained_on_only_without_a_train_split(tmp_path, tiny_tokenizer):
    path = make(tmp_path / "a", {"train.jsonl": "train", "more.jsonl": "more"})
    data = load(path, tiny_tokenizer)
    assert said(data.train) == {"train"}
    assert data.report.notes[0].endswith("not read: files without a split in their names (more.jsonl).")
    path = make(tmp_path / "b", {"reviews.jsonl": "more", "more/test.jsonl": "test"})
    assert said(load(path, tiny_tokenizer).train) == {"more"}
    path = make(tmp_path / "c", {"a.jsonl": "more", "b.csv": "more"})
    data = load(path, tiny_tokenizer)
    assert said(data.train) == {"more"}
    assert not any(note.startswith("Read ") for note in data.report.notes)


def test_testing_rows_are_not_trained_on(tmp_path, tiny_tokenizer):
    path = make(tmp_path / "a", {"test.jsonl": "test"})
    with pytest.raises(DataError, match=r"holds only what is for testing \(test\).*--set data.split=test"):
        load(path, tiny_tokenizer)
    assert said(load(path, tiny_tokenizer, split="test").train) == {"test"}  # it was asked for
    path = make(tmp_path / "b", LAYOUTS[0])
    for name in ("test", "eval"):
        with pytest.raises(DataError, match="what is for testing is not trained on"):
            load(path, tiny_tokenizer, split=name)
        with pytest.raises(DataError, match="what is for testing is not trained on"):
            check_text(TextSection(path=path, split=name), tiny_tokenizer, context_length=256)


def test_a_split_can_be_chosen(tmp_path, tiny_tokenizer):
    path = make(tmp_path / "a", LAYOUTS[0])
    data = load(path, tiny_tokenizer, split="val")
    assert said(data.train) == said(data.validation) == {"validation"}
    with pytest.raises(DataError, match=r"has no split 'trian'; it has test, train, validation; did you mean 'train'"):
        load(path, tiny_tokenizer, split="trian")
    section = recipe_from({"name": "e", "base": "b", "data": {"path": path}}, ["data.split=train"]).data
    assert read_conversations(section)[0][0].messages[0]["content"].startswith("train")


def test_several_splits_of_a_kind_are_told_apart(tmp_path, tiny_tokenizer):
    files = {f"data/{name}-00000-of-00001.parquet": name for name in ("train_sft", "train_gen", "test_sft")}
    path = make(tmp_path / "a", files)
    with pytest.raises(DataError, match="several splits for train: train_gen, train_sft; say which"):
        load(path, tiny_tokenizer)
    assert said(load(path, tiny_tokenizer, split="train_sft").train) == {"train_sft"}


def test_a_separate_validation_folder(tmp_path, tiny_tokenizer):
    path = make(tmp_path / "a", LAYOUTS[0])
    for files, found in ((LAYOUTS[1], "validation"), ({"x.jsonl": "other"}, "other"), ({"test.jsonl": "test"}, "test")):
        other = make(tmp_path / found, files)
        data = load(path, tiny_tokenizer, validation=other)
        assert (said(data.train), said(data.validation)) == ({"train"}, {found})
    with pytest.raises(DataError, match="has no split to validate with; it has test, train"):
        load(path, tiny_tokenizer, validation=make(tmp_path / "z", {"train.jsonl": "train", "test.jsonl": "test"}))


CARD = "---\nlicense: mit\nconfigs:\n{configs}---\n# Reviews\n"


@pytest.mark.parametrize(
    "configs",
    [
        "- config_name: default\n  data_files:\n  - split: train\n    path: parts/a*\n"
        "  - {split: validation, path: [parts/b.jsonl]}\n  - {split: test, path: c.jsonl}\n",
        "- config_name: x\n  default: true\n  data_dir: parts\n  data_files:\n  - {split: train, path: 'a?.jsonl'}\n"
        "  - {split: validation, path: '**/b.jsonl'}\n- {config_name: y, data_files: c.jsonl}\n",
    ],
)
def test_the_card_goes_before_names(tmp_path, tiny_tokenizer, configs):
    files = {"parts/a1.jsonl": "train", "parts/a2.jsonl": "train", "parts/b.jsonl": "validation", "c.jsonl": "c"}
    path = make(tmp_path / "a", files)
    (tmp_path / "a" / "README.md").write_text(CARD.format(configs=configs))
    (tmp_path / "a" / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    data = load(path, tiny_tokenizer)
    assert (said(data.train), said(data.validation)) == ({"train"}, {"validation"})


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ("- {config_name: en, data_files: a.jsonl}\n- {config_name: fr, data_files: b.jsonl}\n", r"datasets \(en, fr"),
        ("- {config_name: en, data_files: nothing.jsonl}\n", "names the data file 'nothing.jsonl', which the folder"),
        ("- {config_name: en, data_files: ../../x.jsonl}\n", "names the data file"),
        ("- {config_name: en, data_files: /etc/passwd}\n", "names the data file"),
        ("- {config_name: en, data_files: [{split: 3}]}\n", "not understood"),
    ],
)  # fmt: skip
def test_cards_that_cannot_be_followed(tmp_path, tiny_tokenizer, configs, words):
    path = make(tmp_path / "a", {"a.jsonl": "a", "b.jsonl": "b"})
    put(tmp_path, "x.jsonl", "outside")
    (tmp_path / "a" / "README.md").write_text(CARD.format(configs=configs))
    with pytest.raises(DataError, match=words):
        load(path, tiny_tokenizer)


@pytest.mark.parametrize(
    "text", ["", "# no card", "---\nlicense: mit\n---\n", "---\n: [\n---\n", "---\nconfigs: 3\n---\n"]
)
def test_other_readmes_say_nothing(tmp_path, text):
    put(tmp_path, "train.jsonl", "a")
    (tmp_path / "README.md").write_text(text)
    assert list(splits_of_folder(tmp_path, [tmp_path / "train.jsonl"]).named) == ["train"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train", "train"), ("TRAINING_set", "train"), ("training-2024", "train"), ("dev1", "validation"),
     ("x.val", "validation"), ("test", "test"), ("train_test", "test"), ("evaluation", "test"), ("latest", None),
     ("contest", None), ("constrain", None), ("developer", None), ("value", None)],
)  # fmt: skip
def test_words_that_name_a_split(name, kind):
    assert kind_of(name) == kind


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand a local folder in for the dataset `org/data` of the hub, which tests cannot reach."""
    import datasets

    folder = tmp_path / "hub"
    real_load, real_names = datasets.load_dataset, datasets.get_dataset_split_names
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda name, split, revision: real_load(str(folder), split=split, cache_dir=str(tmp_path / "hf")),
    )  # fmt: skip
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, revision: real_names(str(folder)))
    monkeypatch.chdir(tmp_path)
    return folder


def test_hub_datasets_are_read_as_what_they_are(hub, tiny_tokenizer):
    make(hub, LAYOUTS[0])
    data = load("org/data", tiny_tokenizer)
    assert (said(data.train), said(data.validation)) == ({"train"}, {"validation"})
    assert (
        "Read the split train as train, the split validation as validation; not read: the split test."
        in data.report.notes
    )
    found, _ = read_conversations(TextSection(path="org/data"))
    assert {row.messages[0]["content"].split()[0] for row in found} == {"test"}
    assert len(load("org/data", tiny_tokenizer, split="train[:4]").train) == 4
    for wanted in ("test", "train+test[:2]"):
        with pytest.raises(DataError, match="not trained on"):
            load("org/data", tiny_tokenizer, split=wanted)
    with pytest.raises(DataError, match="has no split 'trian'"):
        load("org/data", tiny_tokenizer, split="trian")


def test_what_datasets_saved_to_disk(tmp_path, tiny_tokenizer):
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_list(rows(name)) for name in ("train", "validation", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = load(str(tmp_path / "saved"), tiny_tokenizer)
    assert (said(data.train), said(data.validation)) == ({"train"}, {"validation"})
    assert data.report.read == 12
    (tmp_path / "bad.arrow").write_bytes(b"no arrow")
    with pytest.raises(DataError, match="not a readable Arrow file"):
        load(str(tmp_path / "bad.arrow"), tiny_tokenizer)


@pytest.mark.parametrize("split", ["test", "trian", "train[:4]", "train+test"])
def test_a_split_of_a_single_file_is_refused_and_not_ignored(split, tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(9)))
    with pytest.raises(DataError, match=r"has no split|only datasets of the hub are cut or joined"):
        load(str(path), tiny_tokenizer, split=split)
    assert len(load(str(path), tiny_tokenizer, split="train").train)


def test_a_slice_of_a_folders_split_is_refused_and_not_ignored(tmp_path, tiny_tokenizer):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")
    with pytest.raises(DataError, match=r"data.split='train\[:4\]': only datasets of the hub"):
        load(str(tmp_path), tiny_tokenizer, split="train[:4]")
