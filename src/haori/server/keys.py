"""API keys: who may use which adapters, kept as hashes in one file that takes effect as soon as it changes.

A key is `sk-haori-` and 256 random bits, shown once. Only its SHA-256 is kept: that many random bits cannot be
guessed however fast the hash, so the slow hashes that passwords need would only make every request slow.
"""

import hashlib
import hmac
import re
import secrets
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from haori.core.errors import InputError, StorageError, nearest
from haori.core.lock import file_lock
from haori.core.records import Record, now
from haori.core.settings import settings
from haori.core.storage import make_folder, write_text

__all__ = ["ApiKey", "CreatedKey", "KeyStore", "parse_duration"]

_PREFIX = "sk-haori-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._@/*?:-]{1,200}")
_DURATION = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_MINUTES = {"m": 1, "h": 60, "d": 24 * 60}


class ApiKey(Record):
    """What is kept of a key."""

    name: str
    hash: str = Field(description="SHA-256 of the key, in hex.")
    adapters: tuple[str, ...] = Field(description="Patterns of the names that may be used, the base's among them.")
    admin: bool = Field(default=False, description="May load and unload adapters and read metrics.")
    created: str
    expires: str | None = Field(default=None, description="ISO 8601, UTC; None for never.")
    max_concurrent: int | None = Field(default=None, ge=1, description="Answers at once; None for no limit of its own.")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="Of prompts and answers; None for no limit.")

    @property
    def expired(self) -> bool:
        """Say whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= datetime.now(UTC)

    def allows(self, name: str) -> bool:
        """Say whether it may use a name: `support` stands for its versions too, `support@2` for that one."""
        bare = name.partition("@")[0]
        return any(fnmatchcase(name, pattern) or fnmatchcase(bare, pattern) for pattern in self.adapters)


class CreatedKey(NamedTuple):
    """A new key: its record, and the secret that is not kept."""

    key: ApiKey
    secret: str


class _KeyFile(Record):
    schema_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


class KeyStore:
    """The keys in `path` (by default `keys.json` in the home of this machine's Haori)."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = settings().home / "keys.json" if path is None else path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def list(self) -> Sequence[ApiKey]:
        """Return every key, read anew when the file has changed.

        Raises:
            StorageError: The file is damaged or cannot be read.
        """
        with self._lock:
            try:
                found = self.path.stat()
                stamp = (found.st_mtime_ns, found.st_size, found.st_ino)  # a replaced file has another inode
                if stamp != self._stamp:
                    self._keys = _KeyFile.model_validate_json(self.path.read_bytes()).keys
                    self._stamp = stamp
            except FileNotFoundError:
                self._stamp, self._keys = None, ()
            except (ValidationError, OSError):
                raise StorageError(f"The file of API keys {str(self.path)!r} is damaged or cannot be read.") from None
            return self._keys

    def find(self, secret: str) -> ApiKey | None:
        """Return the key of a secret, unless there is none or it has expired."""
        given = _hash(secret)
        found = None
        for key in self.list():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.hash, given):
                found = key
        return None if found is None or found.expired else found

    def create(
        self, name: str, *, adapters: Sequence[str] = ("*",), admin: bool = False, lifetime: timedelta | None = None,
        max_concurrent: int | None = None, tokens_per_minute: int | None = None,
    ) -> CreatedKey:  # fmt: skip
        """Make a key.

        Args:
            name: What logs call it.
            adapters: Patterns (`support`, `support@2`, `team-*`) of the names it may use; none for no answers at all.
            admin: It may also load and unload adapters and read metrics.
            lifetime: When it ends by itself.
            max_concurrent: Most answers that it may have under way at once.
            tokens_per_minute: Most tokens of prompts and answers that it may use in a minute, on average.

        Raises:
            InputError: A limit is less than 1, the name is taken or not allowed, a pattern is not allowed, or the key
                would allow nothing.
            StorageError: The file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"A key cannot be called {name[:80]!r}: use letters, digits, '.', '_' and '-' (at most 64)."
            )
        if wrong := next((pattern for pattern in adapters if not _PATTERN.fullmatch(pattern)), None):
            raise InputError(f"{wrong[:80]!r} is no pattern of adapter names; examples are support, support@2, team-*.")
        if not adapters and not admin:
            raise InputError(f"The key {name!r} would allow nothing: give --adapters or --admin.")
        for what, limit in (("answers at once", max_concurrent), ("tokens a minute", tokens_per_minute)):
            if limit is not None and limit < 1:
                raise InputError(f"The key {name!r} cannot have {limit} {what}; give 1 or more, or leave it out.")
        secret = _PREFIX + secrets.token_urlsafe(32)
        ends = None if lifetime is None else (datetime.now(UTC) + lifetime).isoformat(timespec="seconds")
        key = ApiKey(
            name=name, hash=_hash(secret), adapters=tuple(adapters), admin=admin, created=now(), expires=ends,
            max_concurrent=max_concurrent, tokens_per_minute=tokens_per_minute,
        )  # fmt: skip
        make_folder(self.path.parent)
        with self._writing():
            if any(held.name == name for held in self.list()):
                raise InputError(f"There is a key {name!r} already: revoke it first or choose another name.")
            self._write((*self.list(), key))
        return CreatedKey(key, secret)

    def revoke(self, name: str) -> None:
        """Delete a key; running servers refuse it from the next request on.

        Raises:
            InputError: There is none of that name.
        """
        with self._writing():
            held = self.list()
            if not any(key.name == name for key in held):
                names = [key.name for key in held]
                hint = nearest(name, names) or "`haori keys list` shows them."
                raise InputError(f"There is no key {name!r}; {hint}")
            self._write(tuple(key for key in held if key.name != name))

    def _writing(self) -> AbstractContextManager[None]:
        return file_lock(self.path.with_name(f".{self.path.name}.lock"), holds="file of API keys")

    def _write(self, keys: Sequence[ApiKey]) -> None:
        write_text(self.path, _KeyFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True) + "\n")


def parse_duration(text: str) -> timedelta:
    """Read `90m`, `12h` or `30d`.

    Raises:
        InputError: It is none of these.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise InputError(f"{text!r} is no length of time; give minutes, hours or days, such as 90m, 12h or 30d.")
    return timedelta(minutes=int(found[1]) * _MINUTES[found[2]])


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
