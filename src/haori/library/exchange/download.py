"""Fetches one file from a stranger: gone on with where it stopped, held to what was stated, checked before it is kept.

The file grows as `.part` beside its final name, with what it is a part of in `.part.json`. It takes its name only when
it has its whole length, the stated sha256, and the header of a safetensors (or GGUF) file.
"""

import hashlib
import http.client
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from haori.core.errors import DownloadError, FileFormatError
from haori.core.progress_bar import progress_bar
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import explain_os_errors, make_folder
from haori.library.exchange.messages import message_in
from haori.library.exchange.requesting import Limits, Reply, get

__all__ = ["download", "fetch_json"]

_CHUNK = 1 << 18
_JSON_BYTES = 8 << 20
_TRIES = 3
_HEAD = 64 << 10
_MESSAGES = frozenset({"text/html", "application/json", "application/problem+json", "application/xhtml+xml"})


class _Part(NamedTuple):
    """What a part is a part of; `tag` is a strong ETag."""

    url: str
    tag: str
    size: int | None


class _EndedEarlyError(Exception):
    """The connection ended, with some bytes more than before."""


def download(url: str, target: Path, limits: Limits, *, sha256: str | None = None, what: str = "") -> str:
    """Fetch a file to `target` and return the sha256 of its content, as digits.

    Args:
        url: Where it is.
        target: Its final path; a part that an earlier call left beside it is gone on with.
        limits: What it may take.
        sha256: The sha256 that its site states.
        what: What it is called in messages; by default the URL without its query.

    Raises:
        InputError: The URL may not be fetched.
        DownloadError: It cannot be fetched in full, is too large or too slow, or is not what was stated.
        FileFormatError: It is no adapter file.
        StorageError: It cannot be written.
    """
    what = what or repr(url.partition("?")[0][:200])
    make_folder(target.parent)
    part, end = target.with_name(f"{target.name}.part"), time.monotonic() + limits.total_s
    for tried in range(1, _TRIES + 1):
        before = part.stat().st_size if part.is_file() else 0
        try:
            with explain_os_errors(part):
                _fetch(url, part, limits, end, what)
            break
        except _EndedEarlyError as error:
            held = part.stat().st_size if part.is_file() else 0
            if tried == _TRIES or held <= before:
                raise DownloadError(f"{what} {error}; run the command again to go on from there.") from None
    found = _sha256(part)
    if sha256 is not None and found != sha256.lower():
        said = _message(part)
        _forget(part)
        told = f"the server says: {said}" if said else f"its sha256 is {found}, and its site states {sha256.lower()}"
        raise DownloadError(f"{what} is not what it should be, so it was not kept: {told}.")
    _check_content(part, what)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    _record(part).unlink(missing_ok=True)
    return found


def fetch_json(url: str, limits: Limits) -> dict[str, Any]:
    """Return the JSON object at a URL.

    Raises:
        InputError: The URL may not be fetched.
        DownloadError: There is none, or it does not come in time.
    """
    end = time.monotonic() + limits.total_s
    with get(url, limits, {"Accept": "application/json"}) as reply:
        raw = bytearray()
        try:
            for chunk in _chunks(reply, limits, end):
                raw += chunk
                if len(raw) > _JSON_BYTES:
                    raise DownloadError(f"{reply.place.host!r} sent more than {_JSON_BYTES >> 20} MiB of JSON.")
        except _EndedEarlyError as error:
            raise DownloadError(f"{reply.place.host!r} {error}.") from None
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        said = message_in(bytes(raw[:_HEAD]))
        raise DownloadError(f"{reply.place.host!r} sent no JSON object{f' but {said!r}' if said else ''}.")
    return found


def _fetch(url: str, part: Path, limits: Limits, end: float, what: str) -> None:
    """Make `part` whole, or longer."""
    held = part.stat().st_size if part.is_file() else 0
    known = _read_record(part)
    resumes = held > 0 and known is not None and known.url == _address(url) and bool(known.tag)
    headers = {"Range": f"bytes={held}-", "If-Range": known.tag} if resumes and known else {}
    with get(url, limits, headers) as reply:
        start, size = _extent(reply, held if resumes else 0)
        if start is None:  # 416: nothing is left to send, or the part is none
            if known is not None and known.size == held:
                return
            _forget(part)
            raise _EndedEarlyError("was changed at its site while it was fetched")
        if size is not None and size > limits.size_bytes:
            raise DownloadError(
                f"{what} is {size / 1e9:,.1f} GB; at most {limits.size_bytes / 1e9:,.1f} GB are fetched."
            )
        kind = reply.header("Content-Type").partition(";")[0].strip().lower()
        if kind in _MESSAGES:
            said = reply.message(limits) or "nothing more"
            raise DownloadError(f"{what} is no file: the server sent a message ({kind}) instead, which says: {said}.")
        tag = reply.header("ETag")
        _record(part).write_text(json.dumps(_Part(_address(url), "" if tag.startswith("W/") else tag, size)))
        received = start
        with part.open("r+b" if start else "wb") as file, progress_bar("Fetching", size or 0, "bytes") as advance:
            file.truncate(start)
            file.seek(start)
            advance(start)
            for chunk in _chunks(reply, limits, end):
                received += len(chunk)
                if received > limits.size_bytes or (size is not None and received > size):
                    raise DownloadError(f"{what} is longer than {size or limits.size_bytes:,} bytes, as it may be.")
                file.write(chunk)
                advance(len(chunk))
    if size is not None and received < size:
        raise _EndedEarlyError(f"ended after {received:,} of {size:,} bytes")


def _extent(reply: Reply, held: int) -> tuple[int | None, int | None]:
    """Return from which byte on the reply goes, None if it has none, and how long the whole file is."""
    if reply.status == 416:
        return None, None
    length = reply.header("Content-Length")
    if reply.status != 206:
        return 0, int(length) if length.isdigit() else None
    unit, _, rest = reply.header("Content-Range").partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or int(first) != held:
        raise DownloadError(f"{reply.place.host!r} sent another part of the file than was asked for; try again.")
    return held, int(total) if total.isdigit() else None


def _chunks(reply: Reply, limits: Limits, end: float) -> Iterator[bytes]:
    """Yield the body as it comes; a stretch of time in which too little comes ends it."""
    began, received = time.monotonic(), 0
    while True:
        now = time.monotonic()
        if now > end:
            raise _EndedEarlyError(f"took longer than {limits.total_s:,.0f} s")
        if now - began > limits.stall_s:
            if received < limits.least_bytes:
                raise _EndedEarlyError(f"came at less than {limits.least_bytes / limits.stall_s:,.0f} bytes/s")
            began, received = now, 0
        try:
            reply.limit_wait(min(limits.stall_s, end - now))
            chunk = reply.response.read1(_CHUNK)
        except TimeoutError:
            raise _EndedEarlyError(f"sent nothing for {limits.stall_s:g} s") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _EndedEarlyError(f"broke off ({type(error).__name__})") from error
        if not chunk:
            return
        received += len(chunk)
        yield chunk


def _check_content(part: Path, what: str) -> None:
    """Refuse what is neither safetensors nor GGUF, and pass on the message where it is one."""
    with part.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    try:
        read_safetensors_header(part)
    except FileFormatError as error:
        said = _message(part)
        _forget(part)
        if said is not None:
            raise DownloadError(
                f"{what} is no file: the server sent a message in its place, which says: {said}."
            ) from None
        raise FileFormatError(f"{what} was fetched and not kept: {error}") from None


def _message(part: Path) -> str | None:
    with part.open("rb") as file:
        return message_in(file.read(_HEAD))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _address(url: str) -> str:
    """Return a URL without its query, which may hold a secret and differs from time to time."""
    return url.partition("?")[0]


def _record(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_record(part: Path) -> _Part | None:
    try:
        url, tag, size = json.loads(_record(part).read_text())
    except (OSError, ValueError, TypeError):
        return None
    fits = isinstance(url, str) and isinstance(tag, str) and (size is None or isinstance(size, int))
    return _Part(url, tag, size) if fits else None


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _record(part).unlink(missing_ok=True)
