"""API keys: who may use which adapters, kept as hashes in one file that takes effect as soon as it changes.

A key is `sk-haori-` and 256 random bits, shown once; `tml-` and the same bits is the same key, for clients that ask for
that spelling. Only its SHA-256 is kept: that many random bits cannot be
guessed however fast the hash, so the slow hashes that passwords need would only make every request slow.
"""

import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
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

__all__ = ["SCOPES", "ApiKey", "CreatedKey", "KeyStore", "Scope", "parse_duration", "training_spelling"]

_PREFIX = "sk-haori-"
_TRAINING_PREFIX = "tml-"
Scope = Literal["infer", "train"]
SCOPES: tuple[Scope, ...] = ("infer", "train")
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
    scopes: tuple[Scope, ...] = Field(default=("infer",), description="What it is for: answers, training, or both.")
    owner: str | None = Field(default=None, description="Account that owns what it makes; None for the key's name.")
    bases: tuple[str, ...] = Field(default=("*",), description="Patterns of the bases that it may train.")
    max_jobs: int | None = Field(default=None, ge=1, description="Jobs of its account that have not ended.")
    max_job_rows: int | None = Field(default=None, ge=1, description="Training rows of one job.")
    max_job_tokens: int | None = Field(default=None, ge=1, description="Tokens that its account trains in 30 days.")
    max_file_bytes: int | None = Field(default=None, ge=1, description="Bytes of the files that its account keeps.")

    @property
    def expired(self) -> bool:
        """Say whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= datetime.now(UTC)

    @property
    def account(self) -> str:
        """Return who owns what it makes: keys of one account see each other's files and jobs."""
        return self.owner or self.name

    def trains(self, base: str) -> bool:
        """Say whether it may train a base of this name."""
        return "train" in self.scopes and any(fnmatchcase(base, pattern) for pattern in self.bases)

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
        if secret.startswith(_TRAINING_PREFIX):
            secret = _PREFIX + secret.removeprefix(_TRAINING_PREFIX)
        given = _hash(secret)
        found = None
        for key in self.list():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key.hash, given):
                found = key
        return None if found is None or found.expired else found

    def create(
        self, name: str, *, adapters: Sequence[str] = ("*",), admin: bool = False, lifetime: timedelta | None = None,
        max_concurrent: int | None = None, tokens_per_minute: int | None = None, scopes: Sequence[str] = ("infer",),
        owner: str | None = None, bases: Sequence[str] = ("*",), max_jobs: int | None = None,
        max_job_rows: int | None = None, max_job_tokens: int | None = None, max_file_bytes: int | None = None,
    ) -> CreatedKey:  # fmt: skip
        """Make a key.

        Args:
            name: What logs call it.
            adapters: Patterns (`support`, `support@2`, `team-*`) of the names it may use; none for no answers at all.
            admin: It may also load and unload adapters and read metrics.
            lifetime: When it ends by itself.
            max_concurrent: Most answers that it may have under way at once.
            tokens_per_minute: Most tokens of prompts and answers that it may use in a minute, on average.
            scopes: `infer` for answers, `train` for files, jobs and training sessions.
            owner: Account that owns what it makes, shared by keys that name the same; None for the key's own name.
            bases: Patterns of the bases that it may train.
            max_jobs: Most jobs of its account that have not ended.
            max_job_rows: Most training rows of one job.
            max_job_tokens: Most tokens that its account may train in 30 days.
            max_file_bytes: Most bytes of files that its account may keep.

        Raises:
            InputError: A limit is less than 1, the name is taken or not allowed, a pattern is not allowed, or the key
                would allow nothing.
            StorageError: The file cannot be written.
        """
        limits = {
            "answers at once": max_concurrent, "tokens a minute": tokens_per_minute, "unfinished jobs": max_jobs,
            "rows a job": max_job_rows, "tokens to train in 30 days": max_job_tokens, "bytes of files": max_file_bytes,
        }  # fmt: skip
        _check(name, adapters, scopes, owner, bases, limits, admin=admin)
        secret = _PREFIX + secrets.token_urlsafe(32)
        ends = None if lifetime is None else (datetime.now(UTC) + lifetime).isoformat(timespec="seconds")
        key = ApiKey(
            name=name, hash=_hash(secret), adapters=tuple(adapters), admin=admin, created=now(), expires=ends,
            max_concurrent=max_concurrent, tokens_per_minute=tokens_per_minute,
            scopes=tuple(scope for scope in SCOPES if scope in scopes), owner=owner, bases=tuple(bases),
            max_jobs=max_jobs, max_job_rows=max_job_rows, max_job_tokens=max_job_tokens, max_file_bytes=max_file_bytes,
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
        # What is not set is not written, so that an older version reads the keys that it knows.
        held = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
        write_text(self.path, json.dumps({"schema_version": 1, "keys": held}, indent=2) + "\n")


def training_spelling(secret: str) -> str:
    """Return a key as clients of the training API want it."""
    return _TRAINING_PREFIX + secret.removeprefix(_PREFIX)


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


def _check(
    name: str, adapters: Sequence[str], scopes: Sequence[str], owner: str | None, bases: Sequence[str],
    limits: Mapping[str, int | None], *, admin: bool,
) -> None:  # fmt: skip
    """Refuse what a key cannot have.

    Raises:
        InputError: A name, pattern, scope or limit is not allowed, or the key would allow nothing.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"A key cannot be called {name[:80]!r}: use letters, digits, '.', '_' and '-' (at most 64).")
    if wrong := next((pattern for pattern in adapters if not _PATTERN.fullmatch(pattern)), None):
        raise InputError(f"{wrong[:80]!r} is no pattern of adapter names; examples are support, support@2, team-*.")
    if wrong := next((scope for scope in scopes if scope not in SCOPES), None):
        raise InputError(f"A key cannot be for {wrong[:80]!r}; allowed are {' and '.join(SCOPES)}.")
    if owner is not None and not _NAME.fullmatch(owner):
        raise InputError(f"An account cannot be called {owner[:80]!r}: use letters, digits, '.', '_' and '-'.")
    if wrong := next((pattern for pattern in bases if not _PATTERN.fullmatch(pattern)), None):
        raise InputError(f"{wrong[:80]!r} is no pattern of base names; an example is smollm2-*.")
    if not ((adapters and scopes) or admin):
        raise InputError(f"The key {name!r} would allow nothing: give --adapters and --scopes, or --admin.")
    for what, limit in limits.items():
        if limit is not None and limit < 1:
            raise InputError(f"The key {name!r} cannot have {limit} {what}; give 1 or more, or leave it out.")
