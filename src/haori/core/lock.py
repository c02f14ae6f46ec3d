"""One writer at a time: a lock between processes and threads that the system drops when its holder dies.

An exclusive transaction on an SQLite file that stays empty. SQLite is there on every platform, waits with a time
limit, and leaves nothing behind after a kill.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from haori.core.errors import StorageError
from haori.core.storage import make_folder

__all__ = ["file_lock"]


@contextmanager
def file_lock(path: Path, *, holds: str, timeout_s: float = 120.0) -> Iterator[None]:
    """Hold the lock file `path`, waiting up to `timeout_s` for others.

    Args:
        path: The lock file, made with its folder if need be; it stays, empty.
        holds: What is locked, as the error should call it, such as `library`.
        timeout_s: Longest wait.

    Raises:
        StorageError: The folder cannot be written to, or another process kept the lock for too long.
    """
    make_folder(path.parent)
    with closing(sqlite3.connect(path, timeout=timeout_s, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # nothing is written, not even on a full disk
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"The {holds} {str(path.parent)!r} could not be locked for writing within {timeout_s:.0f} s ({error}); "
                "wait for the other process to end and try again."
            ) from None
        except sqlite3.DatabaseError:
            raise StorageError(f"The lock file {str(path)!r} is damaged; delete it and try again.") from None
        try:
            yield
        finally:
            connection.rollback()
