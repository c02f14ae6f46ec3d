"""Checkpoints of training runs: a row for each, and a folder of PEFT files that no client names directly."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update

from haori.core.errors import InputError
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import checkpoints
from haori.jobs.missing import MissingError
from haori.jobs.sessions.paths import CheckpointPath

__all__ = ["CheckpointShelf", "given_metadata"]

_NUMBER, _GIVEN = "seq_id", "given"


class CheckpointShelf:
    """All checkpoints; every method may be called from any thread.

    Args:
        database: Holds their rows.
        root: Holds their folders.
    """

    def __init__(self, database: Database, root: Path) -> None:
        self._database = database
        self._root = root

    def folder(self, path: CheckpointPath) -> Path:
        """Return where a checkpoint's files belong."""
        return path.folder(self._root)

    def check_free(self, path: CheckpointPath, number: int) -> None:
        """Refuse a name that is taken, unless by this very request, which is done again after a restart.

        Raises:
            InputError: It is.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(checkpoints).where(checkpoints.c.id == path.id)).first()
        if row is not None and not _expired(row) and row.user_metadata[_NUMBER] != number:
            raise InputError(f"There is a checkpoint {path} already; choose another name, or save with overwrite=True.")

    def add(
        self, path: CheckpointPath, owner: str, number: int, *, ttl_s: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Write the row of a checkpoint whose folder is whole; one of that name before is replaced."""
        folder = self.folder(path)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        now = time.time()
        values = {
            "id": path.id, "run_id": path.run, "owner": owner, "kind": path.kind,
            "folder": str(folder.relative_to(self._root)), "bytes": size, "created": now,
            "expires": None if ttl_s is None else now + ttl_s, "published": False,
            "user_metadata": {_NUMBER: number, _GIVEN: None if user_metadata is None else dict(user_metadata)},
        }  # fmt: skip
        with self._database.writing() as connection:
            connection.execute(delete(checkpoints).where(checkpoints.c.id == path.id))
            connection.execute(insert(checkpoints).values(**values))

    def find(self, path: CheckpointPath, owner: str) -> "Row[Any]":
        """Return the row of a checkpoint that an account may read: its own, or a published one.

        Raises:
            MissingError: There is none.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(checkpoints).where(checkpoints.c.id == path.id)).first()
        if row is None or _expired(row) or not (row.owner == owner or row.published):
            raise _missing(path)
        return row

    def list(
        self, owner: str, *, run: str | None = None, limit: int = 100, offset: int = 0
    ) -> "tuple[Sequence[Row[Any]], int]":
        """Return an account's checkpoints, newest first, and how many there are."""
        mine = checkpoints.c.owner == owner
        living = (checkpoints.c.expires.is_(None)) | (checkpoints.c.expires > time.time())
        chosen = mine & living if run is None else mine & living & (checkpoints.c.run_id == run)
        with self._database.reading() as connection:
            count = connection.execute(select(func.count()).select_from(checkpoints).where(chosen)).scalar_one()
            order = (checkpoints.c.created.desc(), checkpoints.c.id)
            rows = connection.execute(select(checkpoints).where(chosen).order_by(*order).limit(limit).offset(offset))
            return rows.all(), count

    def delete(self, path: CheckpointPath, owner: str) -> None:
        """Delete a checkpoint of an account.

        Raises:
            MissingError: There is none.
        """
        with self._database.writing() as connection:
            chosen = (checkpoints.c.id == path.id) & (checkpoints.c.owner == owner)
            if not connection.execute(delete(checkpoints).where(chosen)).rowcount:
                raise _missing(path)
        shutil.rmtree(self.folder(path), ignore_errors=True)

    def change(self, path: CheckpointPath, owner: str, **values: Any) -> None:
        """Change `published` or `expires` of a checkpoint of an account.

        Raises:
            MissingError: There is none.
        """
        with self._database.writing() as connection:
            chosen = (checkpoints.c.id == path.id) & (checkpoints.c.owner == owner)
            if not connection.execute(update(checkpoints).where(chosen).values(**values)).rowcount:
                raise _missing(path)

    def sweep(self) -> None:
        """Delete what has expired."""
        with self._database.reading() as connection:
            chosen = select(checkpoints.c.id, checkpoints.c.owner).where(checkpoints.c.expires <= time.time())
            expired = connection.execute(chosen).all()
        for identity, owner in expired:
            self.delete(CheckpointPath.parse(f"tinker://{identity}"), owner)


def _expired(row: "Row[Any]") -> bool:
    return row.expires is not None and row.expires <= time.time()


def _missing(path: CheckpointPath) -> MissingError:
    return MissingError(f"There is no checkpoint {path}; list them with `tinker checkpoint list`.")


def given_metadata(row: "Row[Any]") -> dict[str, str] | None:
    """Return the metadata that a client gave a checkpoint."""
    given: dict[str, str] | None = row.user_metadata[_GIVEN]
    return given
