"""What is shown on terminals, and the demo data."""

import gzip
import io
import json
import tarfile

import pytest
from rich.console import Console

from haori.core.errors import DataError
from haori.data import fetch_reviews, load_text, read_conversations, report_table, sample_panels
from haori.data import progress as progress_module
from haori.data.conversation import normalise
from haori.data.leaks import find_leaks
from haori.data.progress import tracked
from haori.data.reviews import _INNER, _TABLE, QUESTION, SUBSET_ROWS, Review, ReviewData, order, read_archive
from haori.data.section import TextSection


def plain(renderable) -> str:
    console = Console(width=120, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def small(tmp_path, tiny_tokenizer):
    rows = [{"prompt": f"what is [{i}]?", "completion": f"[bold]{i}[/bold]"} for i in range(20)]
    rows.append(rows[0])
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_text(TextSection(path=str(path), licence="MIT"), tiny_tokenizer, context_length=256)


def test_report_shows_every_figure(small):
    shown = plain(report_table(small.report))
    for piece in (
        "prompt-completion",
        "1 exact duplicates",
        "train",
        "validation",
        "tokens",
        "#",
        "MIT",
        "No problems",
    ):
        assert piece in shown
    report = small.report.with_fields(problems=("f:1:x: [broken]",), truncated=3, notes=("careful",))
    shown = plain(report_table(report))
    assert "Problem: f:1:x: [broken]" in shown
    assert "3 truncated" in shown
    assert "Note: careful" in shown
    assert "No problems" not in shown


def test_samples_mark_trained_tokens_without_colour(small, tiny_tokenizer):
    panels = sample_panels(tiny_tokenizer, small.train, 2)
    assert len(panels) == 2
    shown = plain(panels[0])
    answer = json.loads(small.train[0]["conversation"])["messages"][1]["content"]
    assert f"[[{answer}<|im_end|>]]" in shown  # markup in the data is shown as it is
    assert shown.count("[[") == 2  # one answer, one legend
    assert small.train[0]["origin"] in shown


def test_progress_line_appears_only_when_it_takes_long(monkeypatch):
    def run(patience):
        monkeypatch.setattr(progress_module, "PATIENCE_S", patience)  # or the test would take two seconds
        console = Console(width=100, file=io.StringIO(), force_terminal=True)
        assert list(tracked(range(200), "Reading", total=200, console=console)) == list(range(200))
        return console.file.getvalue()

    assert run(60.0) == ""
    assert "rows/s" in run(-1.0)


# Demo data


@pytest.fixture
def offline(monkeypatch):
    from haori.core.settings import settings

    monkeypatch.setenv("HAORI_OFFLINE", "1")
    settings.cache_clear()


def test_sample_stands_in_when_offline(offline, tmp_path):
    data = fetch_reviews()
    assert data.source == "sample"
    assert "committed sample" in data.note
    assert len(data.test) == 400
    assert len(data.pool) == 640
    train, test = data.write(tmp_path / "demo")
    rows, report = read_conversations(TextSection(path=str(train)))
    assert (report.read, report.kept, report.format) == (640, 640, "messages")
    assert [row.messages[1]["content"] for row in rows].count("positive") == 320
    assert all(row.messages[0]["content"].startswith(QUESTION) and len(row.messages) == 2 for row in rows)
    held, _ = read_conversations(TextSection(path=str(test)))
    assert len(held) == 400
    leaks = find_leaks(held, rows)
    assert (leaks.exact, leaks.near) == (0, 0)
    assert "MIT" in (tmp_path / "demo" / "README.md").read_text()
    with pytest.raises(DataError, match="640 training rows"):
        data.train(641)


def test_fewer_rows_are_the_first_of_more(offline):
    data = fetch_reviews()
    few = data.train(100)
    assert sum(review.positive for review in few) == 50
    assert set(few) <= set(data.train(640))


def archive(table: str) -> bytes:
    def pack(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for member, body in (("../evil.txt", b"x"), (name, content)):
                info = tarfile.TarInfo(member)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        return out.getvalue()

    return pack(_INNER, pack(_TABLE, table.encode("utf-8")))


def table(count: int) -> str:
    good = [
        f"{i}\t{2.0 if i % 2 else -1.0}\tThis is sentence number {i}, caf\u00e9 &amp; all of it.\r\n"
        for i in range(count)
    ]
    other = [
        "1\t0.9\tThis one is not rated far enough from zero, so out.\n",
        "2\t2.0\tToo short\n",
        f"3\t2.0\t{'x' * 240}\n",
    ]
    return "".join([*good, *other])


def test_archive_is_read_by_the_rule(tmp_path):
    path = tmp_path / "v.tar.gz"
    path.write_bytes(archive(table(SUBSET_ROWS)))
    reviews = read_archive(path)
    assert len(reviews) == SUBSET_ROWS
    assert reviews[1] == Review("This is sentence number 1, café & all of it.", positive=True)
    assert not reviews[0].positive
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (archive(table(10)), "gives 10 movie reviews where 8385 are expected"),
        (archive("no tabs here"), "not the expected archive"),
        (gzip.compress(b"not a tar", mtime=0), "not the expected archive"),
        (b"nothing", "not the expected archive"),
        (archive(table(10))[:200], "not the expected archive"),
    ],
)
def test_other_archives_are_refused(tmp_path, content, words):
    path = tmp_path / "v.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_archive(path)


def test_order_is_by_content_and_without_repeats():
    reviews = [Review(f"review {i}", positive=bool(i % 2)) for i in range(50)]
    ordered = order([*reviews, Review("Review  7", positive=True)])
    assert ordered == order(reviews[::-1])
    assert len({normalise(review.text) for review in ordered}) == len(ordered) == 50
    data = ReviewData(ordered[:10], ordered[10:], "x")
    assert not set(data.test) & set(data.pool)
