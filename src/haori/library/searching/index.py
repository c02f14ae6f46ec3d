"""The index of stored adapters: a small SQLite file that makes finding them quick and holds nothing the cards do not.

A missing, damaged or outdated file is made again from the cards by whoever reads next, and so is one that a killed
change left out of step (the mark is there still). Where it cannot be written, every reading goes through the cards.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from haori.core.errors import StorageError
from haori.core.lock import file_lock
from haori.core.records import AdapterCard
from haori.library.searching.entries import (
    CREATE_ENTRIES,
    ENTRIES,
    Found,
    entries_of,
    find_entries,
    insert_entries,
    measured_figures,
    table_of,
)
from haori.library.searching.query import Query
from haori.library.searching.rebuildable import IndexUnusableError, RebuildableFile
from haori.library.stored_cards import checked_cards

__all__ = ["Index", "IndexRow", "Rebuilt"]

T = TypeVar("T")
_ROWS = f"SELECT name, version, adapter, base_id, created FROM {ENTRIES}"  # noqa: S608
_BY_NAME = " ORDER BY name, version"


class IndexRow(NamedTuple):
    """One name of one adapter: what is needed to know what a name means. `base` is the 12 digits of its base."""

    name: str
    version: int
    adapter: str
    base: str
    created: str


class Rebuilt(NamedTuple):
    """What `Index.refill` did: how many adapters are listed, and a sentence for each folder that is not."""

    adapters: int
    problems: tuple[str, ...]


class Index:
    """The index of the library under `root`.

    Attributes:
        path: Its file.
        mark: There while something is changed, and after a change that was killed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path = root / "index.sqlite"
        self.mark = root / ".changing"
        self._file = RebuildableFile(self.path, CREATE_ENTRIES)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the library's lock, without which nothing is changed."""
        return file_lock(self._root / ".lock", holds="library")

    def rows(self) -> Sequence[IndexRow]:
        """Return every row, by name and version."""
        return self._read(_rows, ())

    def rows_at_once(self) -> Sequence[IndexRow] | None:
        """Return the rows that the file holds now, in or out of step; None if it cannot be read."""
        with suppress(IndexUnusableError), self._file.open() as connection:
            return _rows(connection)
        return None

    def rows_of(self, name: str, digits: str | None = None) -> Sequence[IndexRow]:
        """Return the rows of a name, or else of the adapters whose ids begin with these digits."""

        def ask(connection: sqlite3.Connection) -> Sequence[IndexRow]:
            rows = _rows(connection, " WHERE name = ?", name)
            if rows or digits is None:
                return rows
            # Behind every id that begins so, and before the next.
            return _rows(connection, " WHERE adapter >= ? AND adapter < ?", f"sha256:{digits}", f"sha256:{digits}g")

        return self._read(ask, ())

    def find(self, query: Query) -> Found:
        """Return the entries that a query describes."""
        return self._read(lambda connection: find_entries(connection, query), Found((), {}))

    def figures(self) -> frozenset[str]:
        """Return the names of all metrics that some adapter was measured by."""
        return self._read(measured_figures, frozenset())

    def put(self, card: AdapterCard) -> None:
        """Replace the entries of one adapter; without names it is forgotten. The caller holds the lock."""
        try:
            with self._file.open(change=True) as connection:
                connection.execute(f"DELETE FROM {ENTRIES} WHERE adapter = ?", [card.id])  # noqa: S608
                insert_entries(connection, entries_of(card))
        except IndexUnusableError:
            # The change is on disk and complete; without an index the next reader makes one from the cards.
            self._file.drop()

    def current_rows(self) -> Sequence[IndexRow]:
        """Return every row, from the file unless that is out of step; the caller holds the lock."""
        with suppress(IndexUnusableError, StorageError):
            if self.mark.exists() or not self.path.is_file():
                self.refill()
            with self._file.open() as connection:
                return _rows(connection)
        return self._ask_cards(_rows)

    def refill(self) -> Rebuilt:
        """Make the file again from the cards; the caller holds the lock.

        Raises:
            StorageError: It cannot be written.
        """
        cards, problems = checked_cards(self._root)
        entries = [entry for card in cards for entry in entries_of(card)]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(f"DELETE FROM {ENTRIES}")  # noqa: S608
            insert_entries(connection, entries)

        self._file.fill(write)
        self.mark.unlink(missing_ok=True)
        return Rebuilt(len(cards), tuple(problems))

    def _read(self, ask: Callable[[sqlite3.Connection], T], empty: T) -> T:
        """Return what the file answers, made again if it must be, or else what the cards say."""
        if not (self._root / "adapters").is_dir():
            return empty
        if not self.mark.exists():
            with suppress(IndexUnusableError), self._file.open() as connection:
                return ask(connection)
        try:
            with self.lock():
                self.refill()
        except StorageError:
            pass  # a full or read-only disk is no reason not to read: the cards say it all
        else:
            with suppress(IndexUnusableError), self._file.open() as connection:
                return ask(connection)
        return self._ask_cards(ask)

    def _ask_cards(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        entries = (entry for card in checked_cards(self._root)[0] for entry in entries_of(card))
        with table_of(entries) as connection:
            return ask(connection)


def _rows(connection: sqlite3.Connection, where: str = "", *values: str) -> Sequence[IndexRow]:
    return list(map(IndexRow._make, connection.execute(_ROWS + where + _BY_NAME, values)))
