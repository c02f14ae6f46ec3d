"""A SQLite file that holds nothing which cannot be made again: damaged or outdated, it is dropped and filled anew.

Readers never wait for the writer (WAL), and a killed writer leaves what was there before.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from haori.core.errors import StorageError

__all__ = ["IndexUnusableError", "RebuildableFile"]

_BUSY_S = 30.0


class IndexUnusableError(Exception):
    """The file is missing, damaged, or of an older version; internal to the library."""


class RebuildableFile:
    """The database at `path`.

    Args:
        path: The file; its folder is there when it is filled.
        tables: The statements that make its tables, each with IF NOT EXISTS.
    """

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self.path = path
        self._tables = tables

    @contextmanager
    def open(self, *, change: bool = False, create: bool = False) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction, which is kept if the block comes to its end.

        Args:
            change: It writes.
            create: Make the file and its tables where they are not there.

        Raises:
            IndexUnusableError: The file is missing or damaged.
        """
        if not create and not self.path.is_file():
            raise IndexUnusableError
        try:
            with closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as connection:
                if create:
                    connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("BEGIN IMMEDIATE" if change or create else "BEGIN")
                for statement in self._tables if create else ():
                    connection.execute(statement)
                yield connection
                connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise IndexUnusableError from error

    def fill(self, write: Callable[[sqlite3.Connection], None]) -> None:
        """Let `write` put its rows in, in one transaction, with the file made anew if it cannot be used.

        Raises:
            StorageError: The file cannot be written.
        """
        for last in (False, True):
            try:
                with self.open(create=True) as connection:
                    write(connection)
            except IndexUnusableError as error:
                self.drop()
                if last:
                    raise StorageError(f"Cannot write {str(self.path)!r}: {error.__cause__}.") from error
            else:
                return

    def drop(self) -> None:
        """Delete the file; the next reader makes it again."""
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
