"""Sources and readers: every file kind, streams, and files that are not what they should be."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haori.core.errors import DataError
from haori.data import readers
from haori.data.readers import READERS
from haori.data.sources import find_source

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'é, "q"\n2', "completion": "日本"}]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
json_rows = st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), min_size=1, max_size=6)


def read(path: Path, text: str | bytes | None = None) -> list[dict]:
    if isinstance(text, str):
        path.write_text(text, encoding="utf-8", newline="")
    elif text is not None:
        path.write_bytes(text)
    rows = []
    for row in find_source(str(path)).rows():
        if row.problem is not None:
            raise row.problem
        rows.append(row.values)
    return rows


def write_csv(rows: list[dict], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def test_each_kind_gives_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert read(tmp_path / "a.jsonl", lines) == ROWS
    assert read(tmp_path / "bom.jsonl", "\ufeff" + lines) == ROWS
    assert read(tmp_path / "blank.ndjson", lines.replace("\n", "\n\n")) == ROWS
    assert read(tmp_path / "a.json", json.dumps(ROWS, indent=1)) == ROWS
    assert read(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS})) == ROWS
    assert read(tmp_path / "lines.json", lines) == ROWS
    assert read(tmp_path / "one.json", json.dumps(ROWS[0], indent=1)) == ROWS[:1]
    assert read(tmp_path / "a.csv", write_csv(ROWS)) == ROWS
    assert read(tmp_path / "semicolon.csv", write_csv(ROWS[:1], ";")) == ROWS[:1]
    assert read(tmp_path / "a.tsv", write_csv(ROWS, "\t")) == ROWS
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS


def test_text_file_has_a_row_per_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    assert read(path, "\none\ntwo\n\n \nthree") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert [row.origin for row in find_source(str(path)).rows()] == [f"{path}:2", f"{path}:6"]


def test_origin_is_the_line_where_a_csv_row_begins(tmp_path):
    path = tmp_path / "a.csv"
    read(path, 'prompt,completion\n"two\nlines",x\nb,y\n')
    assert [row.origin for row in find_source(str(path)).rows()] == [f"{path}:2", f"{path}:4"]


@given(rows=json_rows, indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40))
def test_json_array_is_streamed_whatever_the_chunks(tmp_path_factory, rows, indent, chunk):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    old, readers._CHUNK = readers._CHUNK, chunk
    try:
        assert read(path) == rows
    finally:
        readers._CHUNK = old


@given(rows=json_rows)
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    assert read(path, "".join(json.dumps(row) + "\n" for row in rows)) == rows


@given(
    cells=st.lists(
        st.tuples(*[st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)] * 2),
        min_size=1,
        max_size=5,
    )
)
def test_csv_round_trip(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    rows = [{"prompt": a, "completion": b} for a, b in cells]
    assert read(path, write_csv(rows)) == rows


@given(raw=st.binary(max_size=200), kind=st.sampled_from(sorted(READERS)))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, raw, kind):
    path = tmp_path_factory.mktemp("bytes") / f"a{kind}"
    try:
        assert isinstance(read(path, raw), list)
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["a.jsonl:2", "broken JSON", '{"prompt":']),
        ("a.jsonl", '["a"]\n', ["a.jsonl:1", "rename"]),
        ("a.jsonl", '{"a": 1}\n"text"\n', ["a.jsonl:2", "must be an object", "str"]),
        ("a.json", '[{"a": 1}, {"a": }]', ["a.json:2", "broken JSON"]),
        ("a.json", '[{"a": 1}, {"a": 2}', ["a.json:3", "broken JSON"]),
        ("a.json", '[{"a": 1},]', ["a.json:2", "broken JSON"]),
        ("a.json", '[{"a": 1}] x', ["after the end"]),
        ("a.json", '[{"a": 1}, 5]', ["a.json:2", "not int"]),
        ("a.json", "[" * 100_000, ["a.json:1", "nested too deeply"]),
        ("a.json", '{"data": 5}', ['"data" must be an array']),
        ("a.json", '{"data": ', ["broken JSON"]),
        ("a.csv", "prompt,completion\na,b\nc\n", ["a.csv:3", "1 cells and the header has 2"]),
        ("a.csv", "prompt,prompt\na,b\n", ["'prompt' is there twice"]),
        ("a.csv", 'prompt,completion\n"a,b\n', ["a.csv:2", "broken CSV"]),
        ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', ["a.jsonl:2", "0xe9", "UTF-8"]),
        ("a.csv", b"prompt,completion\ncaf\xe9,b\n", ["a.csv:2", "UTF-8"]),
        ("a.json", b'[{"a": "caf\xe9"}]', ["a.json", "0xe9"]),
        ("a.jsonl", b"\x89PNG\r\n\x1a\n", ["binary file"]),
        ("a.txt", b"abc\0def", ["binary file"]),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ["UTF-16"]),
        ("a.parquet", b"PAR1 not really", ["not a readable Parquet file"]),
    ],
)
def test_bad_files_are_explained_in_one_sentence(tmp_path, name, content, words):
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, content)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_truncated_parquet_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS * 100), path)
    with pytest.raises(DataError, match="not a readable Parquet"):
        read(path, path.read_bytes()[:-10])


def test_folder_is_read_recursively_and_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, value in (("b/2.jsonl", 2), ("1.jsonl", 1), (".hidden/0.jsonl", 0)):
        (tmp_path / name).write_text(json.dumps({"n": value}) + "\n")
    (tmp_path / "README.txt").write_text("about the data")
    source = find_source(str(tmp_path))
    assert [row.values["n"] for row in source.rows()] == [1, 2]
    assert [row.origin for row in source.rows()] == [f"{tmp_path}/1.jsonl:1", f"{tmp_path}/b/2.jsonl:1"]
    assert source.ignored == ("README.txt",)
    done = [row.done for row in source.rows()]
    assert done == sorted(done)
    assert done[-1] == source.size_bytes


def test_folder_of_text_files_only(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert [row.values["text"] for row in find_source(str(tmp_path)).rows()] == ["one", "two"]


def test_missing_and_unknown_sources(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "a.xlsx").write_text("x")
    (tmp_path / "nothing").mkdir()
    for name, words in (
        ("trian.jsonl", "did you mean 'train.jsonl'"),
        ("empty.csv", "is empty"),
        ("a.xlsx", "unknown kind"),
        ("nothing", "holds no data"),
    ):
        with pytest.raises(DataError, match=words.casefold() if words.startswith("x") else f"(?i){words}"):
            find_source(str(tmp_path / name))


def test_offline_hub_id_is_explained(monkeypatch):
    from haori.core.settings import settings

    for offline in ("1", "0"):  # by our setting, and by HF_HUB_OFFLINE, which the tests run under
        monkeypatch.setenv("HAORI_OFFLINE", offline)
        settings.cache_clear()
        with pytest.raises(
            DataError, match=r"There is no file or folder 'some-org/some-data'.*cannot be fetched"
        ) as caught:
            list(find_source("some-org/some-data").rows())
        assert "\n" not in str(caught.value)


def test_content_hash_follows_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    first = find_source(str(path)).content_hash
    assert find_source(str(path)).content_hash == first
    path.write_text('{"a": 2}\n')
    assert find_source(str(path)).content_hash != first


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    ("text", "twice"), [('{"question": "a", "question": "b", "answer": "c"}', "question"),
                        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content")],
)  # fmt: skip
def test_a_name_that_comes_twice_in_an_object_is_told_and_not_dropped(name, text, twice, tmp_path):
    path = tmp_path / name
    path.write_text(f"[{text}]" if name.endswith("json") else text + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"rows.json.?:1: '{twice}' is there twice; keep one"):
        for row in READERS[path.suffix](path, name):
            if row.problem is not None:
                raise row.problem
