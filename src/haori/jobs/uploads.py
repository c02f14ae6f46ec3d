"""Uploads in parts: a file that arrives in pieces, in any order, and becomes one when it is completed.

A signed upload is one that arrives whole, sent by whoever has its secret: clients that hand the address of a storage
service on send the content there without their key. Its id is made from the secret, which is kept nowhere.
"""

import hashlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Row, delete, func, insert, select, update

from haori.core.errors import InputError
from haori.core.records import Record
from haori.core.storage import explain_os_errors, make_folder
from haori.jobs.database.tables import upload_parts, uploads
from haori.jobs.files import PURPOSES, FileMissingError, FileStore, Incoming, StoredFile, shown_name
from haori.jobs.quotas import Quotas

__all__ = ["MOST_PART_BYTES", "Upload", "UploadPart", "UploadStore"]

MOST_PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_LIFETIME_S = 3600.0
_CHUNK = 1 << 20
_SIGNED = "sha256:"  # in the place of a type, with the hash that was announced
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Upload(Record):
    """An upload as it stands."""

    id: str
    owner: str
    filename: str
    purpose: str
    mime_type: str
    bytes: int
    created: float
    expires: float
    status: Literal["pending", "completed", "cancelled", "expired"]
    file_id: str | None = None
    file_expires_s: int | None = None


class UploadPart(Record):
    """A piece that has arrived."""

    id: str
    upload_id: str
    bytes: int
    created: float


class UploadStore:
    """Uploads of all accounts, whose parts lie beside the files."""

    def __init__(self, files: FileStore) -> None:
        self.files = files
        self.database = files.database
        self.folder = make_folder(files.folder / "parts")

    def create(
        self, owner: str, filename: str, purpose: str, mime_type: str, size: int, *, most_bytes: int,
        expires_s: int | None = None, quotas: Quotas | None = None, upload_id: str | None = None,
    ) -> Upload:  # fmt: skip
        """Begin an upload.

        Raises:
            InputError: There is no such purpose, or the file would be too large.
            HaoriError: The account may not keep as much.
        """
        if purpose not in PURPOSES:
            raise InputError(f"'purpose' cannot be {purpose[:80]!r}; allowed are {', '.join(PURPOSES)}.")
        if size > most_bytes:
            raise InputError(f"'bytes' is {size:,}; a file may have {most_bytes:,}.")
        now = time.time()
        upload = Upload(
            id=upload_id or f"upload_{secrets.token_hex(12)}", owner=owner, filename=shown_name(filename),
            purpose=purpose, mime_type=mime_type, bytes=size, created=now, expires=now + _LIFETIME_S, status="pending",
            file_expires_s=expires_s,
        )  # fmt: skip
        with self.database.writing() as connection:
            (quotas or Quotas()).check_bytes(connection, owner, size)
            connection.execute(insert(uploads).values(upload.model_dump()))
        return upload

    def find(self, upload_id: str, owner: str | None) -> Upload:
        """Return an upload; one whose time is over is expired.

        Raises:
            FileMissingError: There is none, or it belongs to another account.
        """
        with self.database.reading() as connection:
            row = connection.execute(select(uploads).where(uploads.c.id == upload_id)).one_or_none()
        if row is None or (owner is not None and row.owner != owner):
            raise FileMissingError(f"There is no upload {upload_id[:80]!r}.")
        return _read(row)

    def create_signed(
        self, owner: str, filename: str, purpose: str, sha256: str = "", *, quotas: Quotas | None = None
    ) -> tuple[Upload, str]:
        """Begin a signed upload; return it with its secret.

        Args:
            owner: The account.
            filename: What the client calls the file.
            purpose: What it is for.
            sha256: Of the content that is to come; empty if that is not known.
            quotas: What the account may have.

        Raises:
            InputError: There is no such purpose, or the hash is none.
            HaoriError: The account may keep nothing more.
        """
        if sha256 and not _SHA256.fullmatch(sha256):
            raise InputError(f"'checksum' cannot be {sha256[:80]!r}; give the SHA-256 in hexadecimal, or leave it out.")
        secret = secrets.token_urlsafe(32)
        upload = self.create(
            owner, filename, purpose, f"{_SIGNED}{sha256.lower()}", 0, most_bytes=0, quotas=quotas,
            upload_id=_id_of(secret),
        )  # fmt: skip
        return upload, secret

    def find_signed(self, upload_id: str, secret: str) -> Upload:
        """Return the upload that a secret is for.

        Raises:
            FileMissingError: It is for none, or for another.
            InputError: It is not pending any more.
        """
        if not secrets.compare_digest(_id_of(secret), upload_id.encode("ascii", "replace").decode()):
            raise FileMissingError(f"There is no upload {upload_id[:80]!r} with this signature.")
        upload = self.find(upload_id, None)
        _require_pending(upload)
        return upload

    @contextmanager
    def incoming(self, upload: Upload, most_bytes: int | None = None) -> Iterator[Incoming]:
        """Yield a place for a part that arrives; unless it is kept, nothing of it remains.

        Args:
            upload: Whose part it is.
            most_bytes: Largest that is taken, of a signed upload, which does not say how large it is.
        """
        with explain_os_errors(self.folder):
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".incoming-")
        os.close(handle)
        most = min(MOST_PART_BYTES, upload.bytes) if most_bytes is None else most_bytes
        arriving = Incoming(Path(name), "data", "part", most)
        try:
            yield arriving
        finally:
            arriving.close()

    def add_part(self, upload: Upload, arrived: Incoming) -> UploadPart:
        """Keep a part that has arrived whole.

        Raises:
            InputError: The upload is not pending any more, or has all its bytes.
        """
        digest = arrived.finish()
        part = UploadPart(
            id=f"part_{secrets.token_hex(12)}", upload_id=upload.id, bytes=arrived.size, created=time.time()
        )
        with self.database.writing() as connection:
            _require_pending(_read(connection.execute(select(uploads).where(uploads.c.id == upload.id)).one()))
            held = select(func.count(), func.coalesce(func.sum(upload_parts.c.bytes), 0))
            count, size = connection.execute(held.where(upload_parts.c.upload_id == upload.id)).one()
            if upload.mime_type.startswith(_SIGNED):
                _require_whole(upload, digest, count)
                connection.execute(update(uploads).where(uploads.c.id == upload.id).values(bytes=part.bytes))
            elif size + part.bytes > upload.bytes or count >= _MOST_PARTS:
                raise InputError(
                    f"The upload {upload.id!r} is of {upload.bytes:,} bytes and has {size:,} in {count} parts; this "
                    f"one of {part.bytes:,} is too many."
                )
            connection.execute(insert(upload_parts).values(part.model_dump()))
            with explain_os_errors(self.folder):
                arrived.path.replace(self.folder / part.id)
        return part

    def complete(
        self, upload_id: str, owner: str, part_ids: Sequence[str], md5: str | None = None
    ) -> tuple[Upload, StoredFile]:
        """Put the parts together, in the order given; the upload completed before gives the same file again.

        Raises:
            InputError: Parts are missing or not of this upload, or the bytes are not those that were announced.
            DataError: A row of a training file is not as it should be; the upload is still pending.
        """
        upload = self.find(upload_id, owner)
        if upload.status == "completed" and upload.file_id is not None:
            return upload, self.files.find(upload.file_id, owner)
        _require_pending(upload)
        with self.database.reading() as connection:
            query = select(upload_parts.c.id).where(upload_parts.c.upload_id == upload.id)
            known = set(connection.execute(query).scalars())
        if wrong := next((part for part in part_ids if part not in known), None):
            raise InputError(f"'part_ids' has {wrong[:80]!r}, which is no part of the upload {upload.id!r}.")
        if len(set(part_ids)) < len(part_ids):
            raise InputError("'part_ids' names a part twice; give each once, in order.")
        with self.files.incoming(upload.filename, upload.purpose, upload.bytes) as arriving:
            self._join(arriving, part_ids, upload, md5)
            file = self.files.keep(arriving, owner, expires_s=upload.file_expires_s)
        self._end(upload, "completed", file.id)
        return self.find(upload.id, owner), file

    def complete_signed(
        self, upload_id: str, owner: str, *, quotas: Quotas | None = None
    ) -> tuple[Upload, StoredFile]:  # fmt: skip
        """Make a file of a signed upload, as `complete` does.

        Raises:
            InputError: Nothing has arrived.
            HaoriError: As `complete`; or the account may not keep it.
        """
        upload = self.find(upload_id, owner)
        if upload.status == "completed":
            return self.complete(upload_id, owner, [])
        with self.database.writing() as connection:
            query = select(upload_parts.c.id).where(upload_parts.c.upload_id == upload.id)
            parts = list(connection.execute(query).scalars())
            (quotas or Quotas()).check_bytes(connection, owner, 0)  # its bytes are counted, as those of all that come
        if not parts:
            raise InputError(f"Nothing has been sent for the upload {upload.id!r}; send the content to its address.")
        return self.complete(upload_id, owner, parts)

    def cancel(self, upload_id: str, owner: str) -> Upload:
        """End an upload; its parts are deleted.

        Raises:
            InputError: It is not pending any more.
        """
        upload = self.find(upload_id, owner)
        _require_pending(upload)
        self._end(upload, "cancelled", None)
        return self.find(upload.id, owner)

    def sweep(self) -> None:
        """Delete the parts of uploads whose time is over."""
        with self.database.reading() as connection:
            query = select(uploads).where(uploads.c.status == "pending", uploads.c.expires <= time.time())
            over = [_read(row) for row in connection.execute(query)]
        for upload in over:
            self._end(upload, "expired", None)

    def _join(self, arriving: Incoming, part_ids: Sequence[str], upload: Upload, md5: str | None) -> None:
        digest = hashlib.md5(usedforsecurity=False)
        for part in part_ids:
            with (self.folder / part).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    arriving.write(chunk)
        if arriving.size != upload.bytes:
            raise InputError(
                f"The parts have {arriving.size:,} bytes together, and the upload is of {upload.bytes:,}; add what is "
                "missing, or give every part."
            )
        if md5 is not None and md5.lower() != digest.hexdigest():
            raise InputError(f"The parts have the MD5 {digest.hexdigest()}, not {md5[:64]!r}; send them again.")

    def _end(self, upload: Upload, status: str, file_id: str | None) -> None:
        with self.database.writing() as connection:
            of_upload = upload_parts.c.upload_id == upload.id
            gone = (
                connection.execute(delete(upload_parts).where(of_upload).returning(upload_parts.c.id)).scalars().all()
            )
            connection.execute(update(uploads).where(uploads.c.id == upload.id).values(status=status, file_id=file_id))
        for part in gone:
            (self.folder / part).unlink(missing_ok=True)


def _id_of(secret: str) -> str:
    return f"upload_{hashlib.sha256(secret.encode()).hexdigest()[:24]}"


def _require_whole(upload: Upload, digest: str, held: int) -> None:
    """Refuse the content of a signed upload that is another's, or comes a second time."""
    announced = upload.mime_type.removeprefix(_SIGNED)
    if announced and announced != digest:
        raise InputError(f"The content has the SHA-256 {digest}, and {announced} was announced; upload the file again.")
    if held:
        raise InputError(f"The upload {upload.id!r} has its content; begin another.")


def _require_pending(upload: Upload) -> None:
    if upload.status != "pending":
        raise InputError(f"The upload {upload.id!r} is {upload.status}; only a pending one can be changed.")


def _read(row: Row[Any]) -> Upload:
    found = Upload.model_validate(dict(row._mapping))
    over = found.status == "pending" and found.expires <= time.time()
    return found.model_copy(update={"status": "expired"}) if over else found
