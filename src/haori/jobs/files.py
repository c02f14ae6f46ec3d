"""Files that clients upload and jobs leave: a row in the database and the content beside it, under a name of ours.

What a client calls a file is kept as text and is never part of a path. A file appears whole or not at all: its content
is on disk under its final name before its row is committed. Every method may be called from any thread.
"""

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import Row, and_, delete, insert, or_, select

from haori.core.errors import InputError
from haori.core.records import Record
from haori.core.settings import settings
from haori.core.storage import explain_os_errors, make_folder
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import files
from haori.jobs.fine_tuning.row_check import RowSummary, check_rows
from haori.jobs.fine_tuning.row_guard import RowGuard
from haori.jobs.missing import MissingError
from haori.jobs.quotas import Quotas

__all__ = ["PURPOSES", "FileMissingError", "FileStore", "FileTooLargeError", "Incoming", "StoredFile", "shown_name"]

PURPOSES = ("fine-tune", "assistants", "batch", "user_data", "vision")
_TRAINING = "fine-tune"
_UNSEEN_S = 24 * 3600.0  # age at which what no row names is taken for the remains of a killed process
_MOST_NAME = 255


class FileMissingError(MissingError):
    """There is no such file or upload, or it belongs to another account."""


class FileTooLargeError(InputError):
    """A file has more bytes than are taken."""


class StoredFile(Record):
    """A file as it stands."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created: float
    expires: float | None = None
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    summary: RowSummary | None = Field(default=None, description="What is in a training file.")


class Incoming:
    """A file while it arrives, on disk under a temporary name.

    Attributes:
        purpose: What it is for; None while that is not known.
        size: Bytes so far.
    """

    def __init__(self, path: Path, filename: str, purpose: str | None, most_bytes: int) -> None:
        self.path, self.filename, self.purpose = path, shown_name(filename), purpose
        self.size = 0
        self._most = most_bytes
        self._hash = hashlib.sha256()
        self._guard = RowGuard(self.filename)
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            FileTooLargeError: There are more than allowed.
            DataError: A row is longer than any may be, or there are too many.
            StorageError: They cannot be written.
        """
        self.size += len(data)
        if self.size > self._most:
            raise FileTooLargeError(f"{self.filename!r} has more than the {self._most:,} bytes that a file may have.")
        self._guard.watch(data)
        if self.purpose == _TRAINING and self._guard.problem is not None:
            raise self._guard.problem
        self._hash.update(data)
        with explain_os_errors(self.path):
            self._file.write(data)

    def finish(self) -> str:
        """Bring everything to disk; return the SHA-256.

        Raises:
            DataError: It is for training, and a row is longer than any may be, or there are too many.
        """
        if self.purpose == _TRAINING and self._guard.problem is not None:
            raise self._guard.problem
        if not self._file.closed:
            with explain_os_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Remove what was not kept."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class FileStore:
    """The files of all accounts.

    Args:
        database: The open database.
        folder: Folder of their contents; by default `files` in the folder of jobs.
    """

    def __init__(self, database: Database, folder: Path | None = None) -> None:
        self.database = database
        self.folder = make_folder(settings().jobs / "files" if folder is None else folder)

    @contextmanager
    def incoming(self, filename: str, purpose: str | None, most_bytes: int) -> Iterator[Incoming]:
        """Yield a place for a file that arrives; unless it is kept, nothing of it remains."""
        with explain_os_errors(self.folder):
            # What is checked as rows is read by the ending of its name.
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".incoming-", suffix=".jsonl")
        os.close(handle)
        arriving = Incoming(Path(name), filename, purpose, most_bytes)
        try:
            yield arriving
        finally:
            arriving.close()

    def keep(
        self, arrived: Incoming, owner: str, *, expires_s: int | None = None, quotas: Quotas | None = None
    ) -> StoredFile:
        """Keep a file that has arrived whole; a training file is read through first.

        Raises:
            InputError: There is no such purpose.
            DataError: A row of a training file is not as it should be.
            HaoriError: The account may not keep it.
        """
        if arrived.purpose not in PURPOSES:
            raise InputError(
                f"'purpose' cannot be {(arrived.purpose or '')[:80]!r}; allowed are {', '.join(PURPOSES)}."
            )
        digest = arrived.finish()
        summary = check_rows(arrived.path, arrived.filename) if arrived.purpose == _TRAINING else None
        return self._add(arrived, digest, summary, owner, arrived.purpose, expires_s, quotas or Quotas())

    def put(self, owner: str, file_id: str, filename: str, purpose: str, content: bytes) -> StoredFile:
        """Keep what a job made, under an id that the job has for it; the same id again changes nothing."""
        found = self._rows(owner, files.c.id == file_id)
        if found:
            return _read(found[0])
        with self.incoming(filename, "user_data", len(content)) as arriving:
            arriving.write(content)
            return self._add(arriving, arriving.finish(), None, owner, purpose, None, Quotas(), file_id)

    def find(self, file_id: str, owner: str | None) -> StoredFile:
        """Return a file.

        Args:
            file_id: Its id.
            owner: The account that asks; None for anybody.

        Raises:
            FileMissingError: There is none, it has expired, or it belongs to another account.
        """
        found = self._rows(owner, files.c.id == file_id)
        if not found:
            raise FileMissingError(f"There is no file {file_id[:80]!r}; /v1/files lists those that there are.")
        return _read(found[0])

    def list(
        self, owner: str | None, *, purpose: str | None = None, after: str | None = None, limit: int = 100,
        oldest_first: bool = False,
    ) -> tuple[Sequence[StoredFile], bool]:  # fmt: skip
        """Return files of an account, and whether there are more behind them.

        Raises:
            FileMissingError: There is no file `after`.
        """
        asked = [] if purpose is None else [files.c.purpose == purpose]
        if after is not None:
            last = self.find(after, owner)
            same = files.c.created == last.created
            if oldest_first:
                asked.append(or_(files.c.created > last.created, and_(same, files.c.id > last.id)))
            else:
                asked.append(or_(files.c.created < last.created, and_(same, files.c.id < last.id)))
        found = self._rows(owner, *asked, oldest_first=oldest_first, limit=limit + 1)
        return [_read(row) for row in found[:limit]], len(found) > limit

    def delete(self, file_id: str, owner: str | None) -> None:
        """Delete a file; jobs that were made with it keep their copy.

        Raises:
            FileMissingError: There is none, or it belongs to another account.
        """
        found = self.find(file_id, owner)
        with self.database.writing() as connection:
            connection.execute(delete(files).where(files.c.id == found.id))
        self.path(found).unlink(missing_ok=True)

    def path(self, file: StoredFile) -> Path:
        """Return where the content lies."""
        return self._place(file.id, file.purpose)

    def sweep(self) -> None:
        """Delete what has expired, and what killed processes left."""
        now = time.time()
        with self.database.writing() as connection:
            gone = connection.execute(
                delete(files).where(files.c.expires <= now).returning(files.c.id, files.c.purpose)
            )
            for row in gone.all():
                self._place(row.id, row.purpose).unlink(missing_ok=True)
            known = {self._place(row.id, row.purpose).name for row in connection.execute(select(files))}
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in known and path.stat().st_mtime < now - _UNSEEN_S:
                path.unlink(missing_ok=True)

    def _add(
        self, arrived: Incoming, digest: str, summary: RowSummary | None, owner: str, purpose: str,
        expires_s: int | None, quotas: Quotas, file_id: str | None = None,
    ) -> StoredFile:  # fmt: skip
        now = time.time()
        file = StoredFile(
            id=file_id or f"file-{secrets.token_hex(12)}", owner=owner, filename=arrived.filename, purpose=purpose,
            bytes=arrived.size, sha256=digest, created=now, expires=None if expires_s is None else now + expires_s,
            summary=summary,
        )  # fmt: skip
        place = self.path(file)
        try:
            with self.database.writing() as connection:
                quotas.check_bytes(connection, owner, file.bytes)
                connection.execute(insert(files).values(file.model_dump(mode="json")))
                with explain_os_errors(place):
                    arrived.path.chmod(0o600)
                    arrived.path.replace(place)
                    _sync_folder(self.folder)
        except BaseException:
            if not self._exists(file.id):
                place.unlink(missing_ok=True)
            raise
        return file

    def _exists(self, file_id: str) -> bool:
        with self.database.reading() as connection:
            return connection.execute(select(files.c.id).where(files.c.id == file_id)).one_or_none() is not None

    def _place(self, file_id: str, purpose: str) -> Path:
        return self.folder / (f"{file_id}.jsonl" if purpose == _TRAINING else file_id)

    def _rows(self, owner: str | None, *asked: Any, oldest_first: bool = False, limit: int = 1) -> Sequence[Row[Any]]:
        order = (files.c.created, files.c.id)
        query = select(files).where(or_(files.c.expires.is_(None), files.c.expires > time.time()), *asked)
        query = query if owner is None else query.where(files.c.owner == owner)
        query = query.order_by(*(order if oldest_first else [column.desc() for column in order])).limit(limit)
        with self.database.reading() as connection:
            return connection.execute(query).all()


def shown_name(filename: str) -> str:
    """Return what a client calls a file, as text for people: its last part, without what cannot be shown."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(letter if letter.isprintable() else "?" for letter in last)[:_MOST_NAME] or "file"


def _read(row: Row[Any]) -> StoredFile:
    return StoredFile.model_validate(dict(row._mapping))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
