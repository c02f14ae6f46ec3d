"""Keys by which clients mark a request that they may send again, so that one reply that is lost makes nothing twice.

What a request makes has an id that follows from the request (its session and number) or from its key, so doing it
again finds what was made, also after a kill at any instant. Kept here is only which request a key was used for.
"""

import hashlib
import time
import uuid

from sqlalchemy import delete, select

from haori.core.errors import InputError
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import request_keys

__all__ = ["RequestKeys", "id_of_key"]

KEEP_S = 24 * 3600.0
_MOST = 100_000  # of all accounts, about 20 MB
_NAMESPACE = uuid.UUID("a2f7b5f6-9d44-4f0e-8b61-5a3f1c7f2e10")


class RequestKeys:
    """The keys of the last day, the latest 100,000 at most; every method may be called from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, owner: str, key: str, request: str) -> None:
        """Note what a key is used for. The same key of another account is another key.

        Args:
            owner: The account.
            key: As the client gave it, or what else stands for one thing that is made once.
            request: The address and body, in one spelling.

        Raises:
            InputError: It was used for another request.
        """
        identity, asked = _digest(f"{owner}\n{key}"), _digest(request)
        row = {"id": identity, "request": asked, "created": time.time()}
        with self._database.writing() as connection:
            if self._database.insert_once(connection, request_keys, row):
                return
            held = connection.execute(select(request_keys.c.request).where(request_keys.c.id == identity)).scalar_one()
        if held != asked:
            raise InputError(
                f"{key[:200]!r} was used for another request; send that one again as it was, or a new one with a key "
                "or number of its own."
            )

    def sweep(self) -> None:
        """Forget keys that no client sends any more."""
        newest = select(request_keys.c.created).order_by(request_keys.c.created.desc()).offset(_MOST).limit(1)
        with self._database.writing() as connection:
            beyond = connection.execute(newest).scalar_one_or_none()
            oldest = max(time.time() - KEEP_S, beyond or 0.0)
            connection.execute(delete(request_keys).where(request_keys.c.created <= oldest))


def id_of_key(owner: str, key: str) -> str:
    """Return the id of what an account's request makes that has no number of its own."""
    return str(uuid.uuid5(_NAMESPACE, f"{owner}\n{key}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
