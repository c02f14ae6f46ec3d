"""A small SQLite table that makes finding adapters quick. It holds nothing that the folders do not.

One row per name and version. Whoever opens it must be ready to fill it anew: a missing, damaged or outdated file
shows as `IndexUnusableError`, and the folders are the truth. Readers never wait for the writer (WAL).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from haori.core.errors import StorageError
from haori.core.records import AdapterCard

__all__ = ["Index", "IndexRow", "IndexUnusableError", "rows_of"]

_metadata = MetaData()
# A change of columns takes a new table name: an old file then simply lacks the table and is filled again.
_table = Table(
    "adapters_1",
    _metadata,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("adapter", String, nullable=False, index=True),
    Column("base", String, nullable=False),
    Column("method", String, nullable=False),
    Column("licence", String),
    Column("created", String, nullable=False),
    Column("text", String, nullable=False),
)


class IndexUnusableError(Exception):
    """The index file is missing, damaged, or of an older version; internal to the library."""


class IndexRow(NamedTuple):
    """One name of one adapter, with what searches look at."""

    name: str
    version: int
    adapter: str
    base: str
    method: str
    licence: str | None
    created: str
    text: str


def rows_of(card: AdapterCard) -> list[IndexRow]:
    """Return the rows of an adapter: one for each of its names."""
    sources = [f"{data.source} {data.licence or ''}" for data in card.data]
    text = " ".join(
        part
        for part in (
            *card.names, card.base.name, card.base.source, card.base.id, card.method, card.licence,
            card.base.licence, card.description, card.id, *card.tags, *card.stated_bases, *sources,
        )
        if part
    ).lower()  # fmt: skip
    rows = []
    for full in card.names:
        name, _, version = full.rpartition("@")
        rows.append(IndexRow(name, int(version), card.id, card.base.id, card.method, card.licence, card.created, text))
    return rows


class Index:
    """The index file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, words: Sequence[str] = ()) -> list[IndexRow]:
        """Return the rows whose text holds every one of `words`, by name and version.

        Raises:
            IndexUnusableError: The file is missing or damaged.
        """
        query = select(_table).order_by(_table.c.name, _table.c.version)
        for word in words:
            query = query.where(_table.c.text.contains(word.lower(), autoescape=True))
        if not self.path.is_file():
            raise IndexUnusableError
        with self._connection() as connection:
            return [IndexRow(*row) for row in connection.execute(query)]

    def put(self, adapter: str, rows: Sequence[IndexRow]) -> None:
        """Replace the rows of one adapter; none at all forgets it.

        Raises:
            IndexUnusableError: The file is missing or damaged.
        """
        if not self.path.is_file():
            raise IndexUnusableError
        with self._connection() as connection:
            connection.execute(delete(_table).where(_table.c.adapter == adapter))
            if rows:
                connection.execute(insert(_table), [row._asdict() for row in rows])

    def drop(self) -> None:
        """Delete the file; the next reader makes it again."""
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def fill(self, rows: Iterable[IndexRow]) -> None:
        """Replace everything, making the file anew if it cannot be used. The caller holds the library's lock.

        Raises:
            StorageError: The file cannot be written.
        """
        content = [row._asdict() for row in rows]
        try:
            self._fill(content)
        except IndexUnusableError:
            self.drop()
            try:
                self._fill(content)
            except IndexUnusableError as error:
                self.drop()
                raise StorageError(f"Cannot write {str(self.path)!r}: {error.__cause__}.") from error

    def _fill(self, content: list[dict[str, object]]) -> None:
        with self._connection() as connection:
            _metadata.create_all(connection)
            connection.execute(delete(_table))
            if content:
                connection.execute(insert(_table), content)

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        engine = _engine(self.path)
        try:
            with engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            raise IndexUnusableError from error
        finally:
            engine.dispose()


def _engine(path: Path) -> Engine:
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _configure(connection: object, _record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute("PRAGMA busy_timeout = 30000")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.close()

    return engine
