"""What lists and searches show of an adapter, in one SQLite table, so that neither reads cards or files.

Stored adapters and mounted files are kept in tables of the same columns, each in a database of its own.
"""

import heapq
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from haori.core.records import AdapterCard, Verification
from haori.library.licences.verdict import commercial_use
from haori.library.searching.query import Comparison, Filter, Query, folded

__all__ = [
    "CREATE_ENTRIES",
    "ENTRIES",
    "FIGURES",
    "Entry",
    "Found",
    "entries_of",
    "entry_of",
    "find_entries",
    "insert_entries",
    "measured_figures",
    "merge_found",
    "proved",
    "table_of",
    "words_of",
]

# A change of columns takes a new table name: an old file then simply lacks the table and is filled again.
ENTRIES = "entries_2"
_WORD = re.compile(r"[^\W_]+")
_CLOSE = 0.75
_MOST_COMPARED, _MOST_CLOSE, _SHORTEST = 48, 8, 3
FIGURES = {"rank": "rank", "mb": "size_bytes / 1e6"}
"""What every adapter may have, besides the metrics it was measured by, as an expression of the table's columns."""


class Entry(NamedTuple):
    """One name of one adapter, with what a list shows of it and what searches look at.

    Attributes:
        name: Without version, or `mount/folder/name` of a mounted file.
        version: Of a stored adapter; 0 for a mounted file.
        adapter: Content id of a stored adapter; path of a mounted file.
        base: Name of the base it was made for, as far as it is told.
        base_id: The 12 digits of that base.
        family: Kind of base, such as `sd15`.
        proved: What came of its proof, as a list shows it.
        triggers: Trigger words, each on a line of its own.
        tags: Tags, folded, each on a line.
        metrics: Measured figures by name, as JSON.
        mount: Name of the mounted tree it lies in.
        problem: Why a mounted file cannot be used, as a sentence.
        words: The words of its name, triggers and tags, folded, each on a line.
        text: Everything that is known of it, folded.
        commercial: Whether it may be used commercially, as far as its card tells.
    """

    name: str
    version: int
    adapter: str
    base: str
    base_id: str
    family: str | None
    method: str
    format: str
    task: str
    rank: int | None
    size_bytes: int
    licence: str | None
    proved: str
    created: str
    triggers: str
    tags: str
    metrics: str
    mount: str | None
    problem: str | None
    words: str
    text: str
    commercial: str = "unknown"

    @property
    def full_name(self) -> str:
        """Return the name with its version, if it has one."""
        return f"{self.name}@{self.version}" if self.version else self.name


class Found(NamedTuple):
    """What a search found, the best first; `close` has the words that were taken for one that occurs nowhere."""

    entries: tuple[Entry, ...]
    close: dict[str, tuple[str, ...]]


_COLUMNS = ", ".join(Entry._fields)
# The text is searched where it lies: reading it takes longer than all the rest.
_SHOWN = _COLUMNS.replace(", text", ", '' AS text")
CREATE_ENTRIES = (
    f"CREATE TABLE IF NOT EXISTS {ENTRIES} ({_COLUMNS}, PRIMARY KEY (name, version))",
    f"CREATE INDEX IF NOT EXISTS {ENTRIES}_adapter ON {ENTRIES} (adapter)",
)
_INSERT = f"INSERT OR REPLACE INTO {ENTRIES} ({_COLUMNS}) VALUES ({', '.join('?' * len(Entry._fields))})"  # noqa: S608


def entries_of(card: AdapterCard) -> list[Entry]:
    """Return the entries of a stored adapter: one for each of its names."""
    entries = []
    for full in card.names:
        name, _, version = full.rpartition("@")
        entries.append(entry_of(card, name, int(version), card.id))
    return entries


def entry_of(card: AdapterCard, name: str, version: int, adapter: str, mount: str | None = None) -> Entry:
    """Return the entry of an adapter under one of its names."""
    sources = [f"{data.source} {data.licence or ''}" for data in card.data]
    text = (
        name, *card.names, card.base.name, card.base.source, card.base.id, card.base.family, card.method, card.licence,
        card.base.licence, card.description, card.id, card.downloaded_from, card.format, card.task, *card.tags,
        *card.trigger_words, *card.stated_bases, *card.file_hashes.values(), *sources,
    )  # fmt: skip
    metrics = {name: metric.value for of in card.evaluations for name, metric in of.metrics.items()}
    return Entry(
        name=name, version=version, adapter=adapter, base=card.base.name, base_id=card.base.id,
        family=card.base.family, method=card.method, format=card.format, task=card.task, rank=card.rank,
        size_bytes=card.size_bytes, licence=card.licence, proved=proved(card.verification), created=card.created,
        triggers="\n".join(card.trigger_words), tags="\n".join(folded(tag) for tag in card.tags),
        metrics=json.dumps({name: value for name, value in metrics.items() if math.isfinite(value)}),
        mount=mount, problem=None, words=words_of(name, *card.trigger_words, *card.tags),
        text=folded("\n".join(part for part in text if part)), commercial=commercial_use(card),
    )  # fmt: skip


def proved(verification: Verification | None) -> str:
    """Return what came of a proof, in a few words."""
    if verification is None:
        return "no"
    if not verification.passed:
        return f"FAILED: {', '.join(check.name for check in verification.failures)}"
    if any(check.name == "base" and check.detail.startswith("skipped") for check in verification.checks):
        return "the file alone"
    return f"yes, in {verification.dtype}"


def words_of(*texts: str) -> str:
    """Return texts and the words in them, folded, each on a line of its own, so that a whole word can be found."""
    lines = [folded(" ".join(text.split())) for text in texts]
    return "\n".join(["", *dict.fromkeys([*lines, *(word for line in lines for word in _WORD.findall(line))]), ""])


def insert_entries(connection: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    """Add entries to the table; the caller has deleted those of the same names."""
    connection.executemany(_INSERT, entries)


def find_entries(connection: sqlite3.Connection, query: Query) -> Found:
    """Return the entries that a query describes: exact names first, then whole words, beginnings, and the rest.

    Where a word occurs nowhere, the words of names, triggers and tags that are spelled nearly so are looked for
    instead.
    """
    if query.filters:
        connection.create_function("folded", 1, lambda text: text and folded(text), deterministic=True)  # NULL stays
    terms: list[tuple[str, ...]] = [(word,) for word in query.words]
    found = _select(connection, terms, query)
    close: dict[str, tuple[str, ...]] = {}
    if not found and terms:
        for place, word in enumerate(query.words):
            occurs = (len(terms) > 1 or query != Query((word,))) and _select(connection, [(word,)], Query())
            if not occurs and (near := _close_words(connection, word)):
                close[word] = terms[place] = near
        found = _select(connection, terms, query) if close else found
    return Found(tuple(found), close if found else {})


def measured_figures(connection: sqlite3.Connection) -> frozenset[str]:
    """Return the names of all metrics that some adapter was measured by."""
    names = connection.execute(f"SELECT DISTINCT key FROM {ENTRIES}, json_each(metrics) WHERE metrics != '{{}}'")  # noqa: S608
    return frozenset(name for (name,) in names)


@contextmanager
def table_of(entries: Iterable[Entry]) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a table in memory that holds these entries."""
    with closing(sqlite3.connect(":memory:")) as connection:
        for statement in CREATE_ENTRIES:
            connection.execute(statement)
        insert_entries(connection, entries)
        yield connection


def merge_found(founds: Sequence[Found], query: Query) -> Found:
    """Put what several tables gave into one order; what is spelled as asked keeps out what is nearly so."""
    exact = [found for found in founds if found.entries and not found.close]
    chosen = exact or [found for found in founds if found.entries]
    close: dict[str, tuple[str, ...]] = {}
    for found in chosen:
        for word, near in found.close.items():
            close[word] = tuple(dict.fromkeys((*close.get(word, ()), *near)))
    entries = [entry for found in chosen for entry in found.entries]
    if len(chosen) > 1:
        terms = [close.get(word, (word,)) for word in query.words]
        entries.sort(key=lambda entry: (_distance(entry, terms), entry.name, entry.version))
    return Found(tuple(entries), close)


def _select(connection: sqlite3.Connection, terms: Sequence[tuple[str, ...]], query: Query) -> list[Entry]:
    """Return the entries that hold, of each term, one of its words, and pass the filters; the nearest first."""
    conditions: list[str] = []
    values: list[Any] = []
    for words in terms:
        conditions.append(f"({' OR '.join(['instr(text, ?)'] * len(words))})")
        values += words
    for condition, given in (*map(_filter_sql, query.filters), *map(_figure_sql, query.comparisons)):
        conditions.append(condition)
        values += given
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = connection.execute(f"SELECT {_SHOWN} FROM {ENTRIES}{where} ORDER BY name, version", values)  # noqa: S608
    found = list(map(Entry._make, rows))
    if terms:
        found.sort(key=lambda entry: _distance(entry, terms))  # stable: by name and version where equal
    return found


def _distance(entry: Entry, terms: Sequence[tuple[str, ...]]) -> int:
    """Return how far what was asked for is from an entry's own name, words and text; 0 is its name."""
    name = folded(entry.name)
    last = name.rpartition("/")[2]
    steps = 0
    for words in terms:
        steps += min(
            0 if word in (name, last) else
            1 if f"\n{word}\n" in entry.words else
            2 if last.startswith(word) else
            3 if word in entry.words else 4
            for word in words
        )  # fmt: skip
    return steps


def _filter_sql(given: Filter) -> tuple[str, list[Any]]:
    value = given.value
    if given.field == "base":
        return "(folded(family) = ? OR base_id = ? OR instr(folded(base), ?))", [value, value, value]
    if given.field == "licence":
        if value == "unknown":
            return "licence IS NULL", []
        # One licence of an expression such as `(MIT OR Apache-2.0) AND OpenRAIL-M`.
        return "instr(' ' || replace(replace(folded(licence), '(', ' '), ')', ' ') || ' ', ?)", [f" {value} "]
    if given.field == "tag":
        return "instr(char(10) || tags || char(10), ?)", [f"\n{value}\n"]
    if given.field == "trigger":
        return "instr(folded(triggers), ?)", [value]
    return f"folded({given.field}) = ?", [value]


def _figure_sql(asked: Comparison) -> tuple[str, list[Any]]:
    if (column := FIGURES.get(asked.figure)) is not None:
        return f"{column} {asked.sign} ?", [asked.value]
    return f"json_extract(metrics, ?) {asked.sign} ?", [f'$."{asked.figure}"', asked.value]


def _close_words(connection: sqlite3.Connection, word: str) -> tuple[str, ...]:
    """Return the words that are spelled nearly like `word`, the nearest first."""
    if len(word) < _SHORTEST:
        return ()
    (lines,) = connection.execute(f"SELECT group_concat(words, '') FROM {ENTRIES}").fetchone()  # noqa: S608
    # It begins as asked, or with the second letter: few slip at the very first, and so few words are compared.
    first, least, most = re.escape(word[:2]), max(_SHORTEST, len(word) - 2) - 1, len(word) + 1
    known = set(re.findall(rf"\n([{first}][^\n]{{{least},{most}}})(?=\n)", lines or ""))
    letters = set(word)
    half = len(letters) / 2
    likely = heapq.nlargest(
        _MOST_COMPARED,
        (term for term in known if len(letters.intersection(term)) >= half),
        key=lambda term: len(letters.intersection(term)) - abs(len(term) - len(word)),
    )
    scored = [(_likeness(word, term), term) for term in likely]
    return tuple(term for score, term in sorted(scored, reverse=True)[:_MOST_CLOSE] if score >= _CLOSE)


def _likeness(one: str, other: str) -> float:
    """Return how alike two words are, from 0 to 1; two letters in each other's place count as half a fault."""
    alike = SequenceMatcher(None, one, other, autojunk=False).ratio()
    return max(alike, 0.9 if Counter(one) == Counter(other) and one[0] == other[0] else 0.0)
