"""Searching the library: words, filters and figures, the nearest first; nothing but the index is read."""

import sqlite3

import pytest

from haori.core.errors import InputError
from haori.core.records import DataReference, Evaluation, Metric
from haori.library import Library, list_table
from haori.library.searching.query import Comparison, Filter, parse_query
from tests.library_samples import base_reference, card_of, written_adapter


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "library")


def evaluation(**metrics: float) -> Evaluation:
    data = DataReference(source="t", hash="h", format="messages", rows={"test": 3})
    return Evaluation(data=data, metrics={name: Metric(value=value) for name, value in metrics.items()}, time="now")


def put(library: Library, tmp_path, name: str, seed: int, **fields):
    folder = written_adapter(tmp_path / f"made-{seed}", seed=seed)
    return library.add(folder, name, card_of(folder, **fields))


def names(library: Library, query: str) -> list[str]:
    return [listed.entry.full_name for listed in library.search(query).listed]


@pytest.fixture
def filled(library, tmp_path) -> Library:
    sd15 = base_reference("stable-diffusion-v1-5", structure="i").with_fields(family="sd15")
    put(library, tmp_path, "smile", 1, base=sd15, trigger_words=("smiling",), tags=("Style", "soft light"),
        licence="Apache-2.0", evaluations=(evaluation(accuracy=0.5), evaluation(accuracy=0.9, loss=0.1)))  # fmt: skip
    put(library, tmp_path, "smile-grin", 2, base=sd15, licence="MIT OR (Apache-2.0 AND ISC)")
    put(library, tmp_path, "my-smile", 3, description="a lifelike one", evaluations=(evaluation(accuracy=0.8),))
    put(library, tmp_path, "portrait", 4, description="people who smiled", licence=None)
    return library


def test_a_query_is_words_filters_and_figures():
    query = parse_query('Smile BASE:SD15 license:Apache-2.0 accuracy>0.8 rank<=8 tag:"soft light" "two words" hub:a/b')
    assert query.words == ("smile", "two words", "hub:a/b")
    assert query.filters == (Filter("base", "sd15"), Filter("licence", "apache-2.0"), Filter("tag", "soft light"))
    assert query.comparisons == (Comparison("accuracy", ">", 0.8), Comparison("rank", "<=", 8.0))
    assert parse_query("  ") == parse_query("")


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("licens:mit", "no filter 'licens' to search by; did you mean 'licence'"),
        ("tag:", "needs a value"),
        ("accuracy>high", "'high', which is no number"),
        ("acuracy>0.5", "No adapter has the figure 'acuracy'; did you mean 'accuracy'"),
    ],
)
def test_what_cannot_be_meant_is_said_to_be_so(filled, query, said):
    with pytest.raises(InputError, match=said):
        filled.search(query)


def test_the_nearest_come_first(filled):
    assert names(filled, "smile") == ["smile@1", "my-smile@1", "smile-grin@1", "portrait@1"]
    assert names(filled, "SMILING") == ["smile@1"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("base:sd15", ["smile@1", "smile-grin@1"]),
        ("base:v1-5 grin", ["smile-grin@1"]),
        ("licence:apache-2.0", ["smile@1", "smile-grin@1"]),
        ("licence:apache", []),
        ("licence:unknown", []),
        ("tag:style", ["smile@1"]),
        ("tag:sty", []),
        ('tag:"soft light"', ["smile@1"]),
        ("trigger:smil", ["smile@1"]),
        ("method:lora smile base:tiny", ["my-smile@1", "portrait@1"]),
        ("accuracy>0.8", ["smile@1"]),
        ("accuracy>=0.8", ["my-smile@1", "smile@1"]),
        ("accuracy<0.6", []),  # the newest measurement counts
        ("loss<0.2 rank>=4 mb<1", ["smile@1"]),
        ("rank>4", []),
        ("%", []),
        ("_m_", []),
    ],
)
def test_filters_and_figures_must_all_hold(filled, query, expected):
    assert names(filled, query) == expected


def test_a_word_that_occurs_nowhere_is_taken_for_a_close_one(filled):
    for typed, meant in (("smlie", "smile"), ("smilling", "smiling"), ("portrat", "portrait")):
        found = filled.search(typed)
        assert meant in found.close[typed], typed
        assert found.listed, typed
    assert filled.search("portrat").listed[0].entry.name == "portrait"
    # What is spelled right is not widened, and what is far from everything finds nothing.
    assert filled.search("smile").close == {}
    assert filled.search("xylophone") == ((), {})
    assert filled.search("smile gri portrat").listed == ()


def test_letters_are_compared_without_case_and_unicode_forms(library, tmp_path):
    put(library, tmp_path, "mountain", 1, trigger_words=("山の風景", "CAFÉ"), tags=("Straße",))
    for query in ("山の", "cafe\u0301", "STRASSE", "tag:straße", "trigger:café", "風景"):
        assert names(library, query) == ["mountain@1"], query


def test_lists_and_searches_read_no_card(filled, monkeypatch):
    from haori.library import stored_cards

    monkeypatch.setattr(stored_cards, "read_card", lambda folder: pytest.fail("a card was read"))
    assert len(names(filled, "")) == 4
    assert names(filled, "grin accuracy<2") == []
    table = list_table(filled.search("grin").listed)
    assert table.row_count == 1


def test_a_promoted_version_is_marked(filled, tmp_path):
    put(filled, tmp_path, "smile", 9)
    filled.promote("smile@1")
    assert [(one.entry.full_name, one.promoted) for one in filled.search("smile").listed][:2] == [
        ("smile@1", True),
        ("smile@2", False),
    ]


def test_an_index_of_other_columns_is_made_again(filled):
    path = filled.root / "index.sqlite"
    with sqlite3.connect(path) as connection:
        (table,) = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        connection.execute(f"ALTER TABLE {table} RENAME TO adapters_1")
    assert len(names(filled, "")) == 4
    assert filled.get("smile").name == "smile@1"
