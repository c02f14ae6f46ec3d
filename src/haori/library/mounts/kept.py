"""What is remembered of mounted files between scans: an SQLite file that can be made again by reading them all.

A name is looked up here without touching the tree: by its path, its file name, its trainer's name for it, a hash.
"""

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from haori.library.searching.entries import CREATE_ENTRIES, ENTRIES, Entry, Found, find_entries, insert_entries
from haori.library.searching.query import Query, folded
from haori.library.searching.rebuildable import IndexUnusableError, RebuildableFile

__all__ = ["Fitting", "KeptFile", "KeptFiles"]

_TABLES = (
    "CREATE TABLE IF NOT EXISTS files_1 (mount TEXT, place TEXT, name TEXT, stem TEXT, alias TEXT, stamp TEXT,"
    " settled INTEGER, sidecar_names TEXT, hashes TEXT, sha256 TEXT, card TEXT, sidecars TEXT, problem TEXT,"
    " PRIMARY KEY (mount, place))",
    *(f"CREATE INDEX IF NOT EXISTS files_1_{column} ON files_1 ({column})" for column in ("name", "stem", "alias")),
    "CREATE TABLE IF NOT EXISTS folders_1 (mount TEXT, place TEXT, changed INTEGER, PRIMARY KEY (mount, place))",
    *CREATE_ENTRIES,
)


class KeptFile(NamedTuple):
    """One mounted file.

    Attributes:
        mount: Name of the tree.
        place: Path from its root.
        name: What it is asked for by: `mount/folder/stem`.
        stem: Last part of that, folded.
        alias: Its trainer's name for it, folded.
        stamp: What changes with the file and its sidecars.
        settled: A change after that stamp would show.
        sidecar_names: Names of its sidecars, each on a line.
        hashes: Digits that its header and sidecars state, each behind a blank.
        sha256: Hashes of its content as `name=digits`, where that was read; else empty.
        card: Its card as JSON; empty where it has a problem.
        sidecars: What its sidecars say, as JSON.
        problem: Why it cannot be used.
    """

    mount: str
    place: str
    name: str
    stem: str
    alias: str
    stamp: str
    settled: int
    sidecar_names: str
    hashes: str
    sha256: str
    card: str
    sidecars: str
    problem: str | None


T = TypeVar("T")


class Fitting(NamedTuple):
    """The files that a spec means, and the folders that another such file would lie in: (mount, place, changed)."""

    files: Sequence[KeptFile]
    folders: Sequence[tuple[str, str, int]]


class Stamp(NamedTuple):
    """What tells whether a file must be read again, and whether its content was hashed."""

    stamp: str
    settled: int
    name: str
    hashed: int


_COLUMNS = ", ".join(KeptFile._fields)
_MARKS = ", ".join("?" * len(KeptFile._fields))
_INSERT = f"INSERT OR REPLACE INTO files_1 ({_COLUMNS}) VALUES ({_MARKS})"  # noqa: S608
_FOLDERS = "SELECT mount, place, changed FROM folders_1"
_SELECT = f"SELECT {_COLUMNS} FROM files_1"  # noqa: S608


class KeptFiles:
    """The file at `path`. Reading what is missing or damaged gives nothing; writing makes it anew."""

    def __init__(self, path: Path) -> None:
        self._file = RebuildableFile(path, _TABLES)

    def fitting(self, spec: str, digits: str | None) -> Fitting:
        """Return the files that a spec means: by path, else by file name, else by alias, else by hash."""
        word = folded(spec)
        if not word:
            return Fitting((), ())  # most files have no alias, which is empty here
        ways = (
            [("name = ?", [spec]), ("folded(name) = ?", [word])]
            if "/" in spec
            else [("stem = ?", [word]), ("alias = ?", [word])]
        )
        if digits is not None:
            ways.append(("(instr(sha256, ?) OR instr(hashes, ?))", [f"={digits}", f" {digits}"]))

        def ask(connection: sqlite3.Connection) -> Fitting:
            connection.create_function("folded", 1, folded, deterministic=True)
            for condition, values in ways:
                if files := list(map(KeptFile._make, connection.execute(f"{_SELECT} WHERE {condition}", values))):
                    # A path is that of one file; under another name one more may lie in any folder.
                    where = [(file.mount, file.place.rpartition("/")[0]) for file in files]
                    one = f"{_FOLDERS} WHERE mount = ? AND place = ?"
                    if "/" in spec:
                        rows = [row for each in where for row in connection.execute(one, each)]
                    else:
                        rows = connection.execute(_FOLDERS).fetchall()
                    return Fitting(files, rows)
            return Fitting((), ())

        return self._ask(ask, Fitting((), ()))

    def stamps(self, mount: str) -> dict[str, Stamp]:
        """Return the stamps of the files of a mount, by place."""
        columns = "place, stamp, settled, name, sha256 != ''"

        def ask(connection: sqlite3.Connection) -> dict[str, Stamp]:
            rows = connection.execute(f"SELECT {columns} FROM files_1 WHERE mount = ?", [mount])  # noqa: S608
            return {place: Stamp(*values) for place, *values in rows}

        return self._ask(ask, {})

    def names(self, mount: str) -> Sequence[str]:
        """Return the names of the files of a mount."""

        def ask(connection: sqlite3.Connection) -> Sequence[str]:
            return [name for (name,) in connection.execute("SELECT name FROM files_1 WHERE mount = ?", [mount])]

        return self._ask(ask, ())

    def folders(self, mount: str) -> dict[str, int]:
        """Return when each folder of a mount was changed last, as of the last scan."""

        def ask(connection: sqlite3.Connection) -> dict[str, int]:
            return dict(connection.execute("SELECT place, changed FROM folders_1 WHERE mount = ?", [mount]).fetchall())

        return self._ask(ask, {})

    def unhashed(self) -> Sequence[KeptFile]:
        """Return the files whose content was not hashed yet."""

        def ask(connection: sqlite3.Connection) -> Sequence[KeptFile]:
            rows = connection.execute(f"{_SELECT} WHERE sha256 = '' AND problem IS NULL ORDER BY name")
            return list(map(KeptFile._make, rows))

        return self._ask(ask, ())

    def beside(self) -> dict[str, tuple[str, str]]:
        """Return, by `mount/place`, the alias of every usable file and what its sidecars say, as JSON."""

        def ask(connection: sqlite3.Connection) -> dict[str, tuple[str, str]]:
            rows = connection.execute("SELECT mount, place, alias, sidecars FROM files_1 WHERE problem IS NULL")
            return {f"{mount}/{place}": (alias, sidecars) for mount, place, alias, sidecars in rows}

        return self._ask(ask, {})

    def find(self, query: Query) -> Found:
        """Return the entries that a query describes."""
        return self._ask(lambda connection: find_entries(connection, query), Found((), {}))

    def put(self, mount: str, gone: Iterable[str], files: Sequence[tuple[KeptFile, Entry]]) -> None:
        """Replace or add files of a mount, and forget those at the places `gone`.

        Raises:
            StorageError: The file cannot be written.
        """
        places = [*gone, *(file.place for file, _ in files)]

        def write(connection: sqlite3.Connection) -> None:
            for place in places:
                connection.execute(f"DELETE FROM {ENTRIES} WHERE adapter = ?", [f"{mount}/{place}"])  # noqa: S608
                connection.execute("DELETE FROM files_1 WHERE mount = ? AND place = ?", [mount, place])
            connection.executemany(_INSERT, [file for file, _ in files])
            insert_entries(connection, (entry for _, entry in files))

        self._file.fill(write)

    def put_folders(self, mount: str, folders: Mapping[str, int]) -> None:
        """Replace what is known of the folders of a mount; none at all forgets the mount with its files.

        Raises:
            StorageError: The file cannot be written.
        """

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM folders_1 WHERE mount = ?", [mount])
            rows = [(mount, place, changed) for place, changed in folders.items()]
            connection.executemany("INSERT INTO folders_1 (mount, place, changed) VALUES (?, ?, ?)", rows)
            if not folders:
                connection.execute("DELETE FROM files_1 WHERE mount = ?", [mount])
                connection.execute(f"DELETE FROM {ENTRIES} WHERE mount = ?", [mount])  # noqa: S608

        self._file.fill(write)

    def put_hashes(self, files: Sequence[KeptFile]) -> None:
        """Remember the hashes of files' contents, where they are still the same files.

        Raises:
            StorageError: The file cannot be written.
        """

        def write(connection: sqlite3.Connection) -> None:
            values = [(file.sha256, file.mount, file.place, file.stamp) for file in files]
            change = "UPDATE files_1 SET sha256 = ? WHERE mount = ? AND place = ? AND stamp = ?"
            connection.executemany(change, values)

        self._file.fill(write)

    def _ask(self, ask: Callable[[sqlite3.Connection], T], empty: T) -> T:
        try:
            with self._file.open() as connection:
                return ask(connection)
        except IndexUnusableError:
            return empty
