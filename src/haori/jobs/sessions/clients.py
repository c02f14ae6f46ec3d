"""The rows of sessions: a client that is connected, or was."""

import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Row, func, select, update

from haori.jobs.database.connection import Database
from haori.jobs.database.tables import sessions
from haori.jobs.missing import MissingError
from haori.jobs.sessions.gone import GoneError
from haori.jobs.sessions.request_keys import id_of_key

__all__ = ["Clients"]

_WRITE_EVERY_S = 60.0


class Clients:
    """All sessions; every method may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[str, float, float]] = {}  # owner, seen, written; of live sessions

    def open(
        self, owner: str, *, tags: Sequence[str] = (), user_metadata: Mapping[str, Any] | None = None,
        sdk_version: str | None = None, request_key: str | None = None,
    ) -> str:  # fmt: skip
        """Make a session, or return that which the same request made before.

        Args:
            owner: The account.
            tags: As the client gave them.
            user_metadata: The same.
            sdk_version: The client's version.
            request_key: What a client that tries again sends again.
        """
        identity = str(uuid.uuid4()) if request_key is None else id_of_key(owner, request_key)
        now = time.time()
        values = {"id": identity, "owner": owner, "created": now, "heartbeat": now, "tags": list(tags),
                  "user_metadata": user_metadata, "sdk_version": sdk_version}  # fmt: skip
        with self._database.writing() as connection:
            self._database.insert_once(connection, sessions, values)
        return identity

    def beat(self, identity: str, owner: str) -> None:
        """Note that a client is there.

        Raises:
            GoneError: There is no such session, or it has ended.
        """
        now = time.time()
        with self._lock:
            known, _, written = self._seen.get(identity, ("", 0.0, 0.0))
            if known == owner and now - written < _WRITE_EVERY_S:
                self._seen[identity] = (owner, now, written)
                return
        chosen = (sessions.c.id == identity) & (sessions.c.owner == owner) & sessions.c.ended.is_(None)
        with self._database.writing() as connection:
            found = connection.execute(update(sessions).where(chosen).values(heartbeat=now)).rowcount
        if not found:
            raise GoneError(f"There is no session {identity[:200]!r}, or it has ended; create a new one.")
        with self._lock:
            self._seen[identity] = (owner, now, now)

    def find(self, identity: str, owner: str) -> "Row[Any]":
        """Return the row of a session of an account.

        Raises:
            MissingError: There is none.
        """
        with self._database.reading() as connection:
            chosen = (sessions.c.id == identity) & (sessions.c.owner == owner)
            row = connection.execute(select(sessions).where(chosen)).first()
        if row is None:
            raise MissingError(f"There is no session {identity[:200]!r}; create one first.")
        return row

    def list(self, owner: str, *, limit: int, offset: int) -> list[str]:
        """Return the ids of an account's sessions, newest first."""
        chosen = select(sessions.c.id).where(sessions.c.owner == owner).order_by(sessions.c.created.desc())
        with self._database.reading() as connection:
            return list(connection.execute(chosen.limit(limit).offset(offset)).scalars())

    def count(self, owner: str) -> int:
        """Return how many sessions an account has."""
        with self._database.reading() as connection:
            chosen = select(func.count()).select_from(sessions).where(sessions.c.owner == owner)
            return int(connection.execute(chosen).scalar_one())

    def end(self, identity: str, owner: str, ending: Mapping[str, Any]) -> None:
        """End a session of an account, and keep what the client says of it; one that has ended is no error."""
        said = {**(self.find(identity, owner).user_metadata or {}), "ending": dict(ending)}
        with self._database.writing() as connection:
            changed = update(sessions).where(sessions.c.id == identity)
            connection.execute(changed.values(ended=time.time(), user_metadata=said))
        with self._lock:
            self._seen.pop(identity, None)

    def silent(self, longer_than_s: float) -> set[str]:
        """Return the sessions that were seen by this process, and of which nothing was heard for so long."""
        now = time.time()
        with self._lock:
            gone = {identity for identity, (_, seen, _) in self._seen.items() if now - seen > longer_than_s}
            for identity in gone:
                del self._seen[identity]
        return gone
