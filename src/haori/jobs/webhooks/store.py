"""Webhook endpoints of accounts, and the deliveries to them, in the database."""

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, and_, delete, insert, select, update

from haori.core.errors import InputError
from haori.core.records import Record
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import deliveries, jobs, webhooks
from haori.jobs.fine_tuning.service import KIND
from haori.jobs.missing import MissingError
from haori.jobs.webhooks.sending import check_target, new_secret

__all__ = ["EVENT_TYPES", "Delivery", "Webhook", "WebhookMissingError", "WebhookStore"]

EVENT_TYPES = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
_MOST = 20
_BOTH_S = 24 * 3600.0
_REMEMBERED_S = 3 * 24 * 3600.0
_CLAIMED_S = 60.0
_WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0)


class WebhookMissingError(MissingError):
    """There is no such endpoint, or it belongs to another account."""


class Webhook(Record):
    """An endpoint."""

    id: str
    owner: str
    name: str | None
    url: str
    secret: str
    old_secret: str | None = None
    old_secret_until: float | None = None
    event_types: tuple[str, ...]
    enabled: bool = True
    created: float

    @property
    def signing(self) -> Sequence[str]:
        """Return the secrets that deliveries are signed with."""
        both = self.old_secret is not None and (self.old_secret_until or 0.0) > time.time()
        return [self.secret, self.old_secret] if both and self.old_secret is not None else [self.secret]


class Delivery(Record):
    """An event on its way to an endpoint."""

    id: str
    webhook_id: str
    event: dict[str, Any]
    attempts: int
    next_at: float | None
    delivered: float | None = None
    error: str | None = None


class WebhookStore:
    """Endpoints and deliveries of all accounts."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, owner: str, name: str, url: str, event_types: Sequence[str]) -> Webhook:
        """Make an endpoint.

        Raises:
            InputError: The URL or an event is none that is allowed, or the account has too many.
        """
        check_target(url)
        _check_types(event_types)
        webhook = Webhook(
            id=f"we_{secrets.token_hex(12)}", owner=owner, name=name, url=url, secret=new_secret(),
            event_types=tuple(event_types), created=time.time(),
        )  # fmt: skip
        if len(self.list(owner)) >= _MOST:
            raise InputError(f"The account {owner!r} has {_MOST} webhook endpoints, the most there may be; delete one.")
        with self.database.writing() as connection:
            connection.execute(insert(webhooks).values(webhook.model_dump(mode="json")))
        return webhook

    def find(self, webhook_id: str, owner: str | None) -> Webhook:
        """Return an endpoint.

        Raises:
            WebhookMissingError: There is none, or it belongs to another account.
        """
        with self.database.reading() as connection:
            row = connection.execute(select(webhooks).where(webhooks.c.id == webhook_id)).one_or_none()
        if row is None or (owner is not None and row.owner != owner):
            raise WebhookMissingError(f"There is no webhook endpoint {webhook_id[:80]!r}.")
        return _webhook(row)

    def list(self, owner: str) -> Sequence[Webhook]:
        """Return the endpoints of an account, the newest first."""
        query = select(webhooks).where(webhooks.c.owner == owner).order_by(webhooks.c.created.desc(), webhooks.c.id)
        with self.database.reading() as connection:
            return [_webhook(row) for row in connection.execute(query)]

    def change(
        self, webhook_id: str, owner: str, *, name: str | None = None, url: str | None = None,
        event_types: Sequence[str] | None = None,
    ) -> Webhook:  # fmt: skip
        """Change what is given.

        Raises:
            InputError: The URL or an event is none that is allowed.
        """
        self.find(webhook_id, owner)
        if url is not None:
            check_target(url)
        if event_types is not None:
            _check_types(event_types)
        given = {"name": name, "url": url, "event_types": None if event_types is None else list(event_types)}
        self._write(webhook_id, {key: value for key, value in given.items() if value is not None})
        return self.find(webhook_id, owner)

    def rotate(self, webhook_id: str, owner: str, *, keep_old: bool) -> Webhook:
        """Give an endpoint a new secret; the old one may sign beside it for a day."""
        found = self.find(webhook_id, owner)
        old = {"old_secret": found.secret, "old_secret_until": time.time() + _BOTH_S}
        none = {"old_secret": None, "old_secret_until": None}
        self._write(webhook_id, {"secret": new_secret(), **(old if keep_old else none)})
        return self.find(webhook_id, owner)

    def delete(self, webhook_id: str, owner: str) -> None:
        """Delete an endpoint, with what is on its way there."""
        self.find(webhook_id, owner)
        with self.database.writing() as connection:
            connection.execute(delete(webhooks).where(webhooks.c.id == webhook_id))

    def gather(self) -> int:
        """Write a delivery for each job that ended and each endpoint that wants to know; return how many are new.

        The id of a delivery is that of the ending, so that it is written once, whoever gathers.
        """
        ended = and_(
            jobs.c.kind == KIND, jobs.c.ended > time.time() - _REMEMBERED_S, jobs.c.ended >= webhooks.c.created
        )
        ended = and_(ended, jobs.c.state.in_([kind.rpartition(".")[2] for kind in EVENT_TYPES]), webhooks.c.enabled)
        query = select(jobs.c.id, jobs.c.state, jobs.c.ended, webhooks.c.id.label("hook"), webhooks.c.event_types)
        query = query.join(webhooks, webhooks.c.owner == jobs.c.owner).where(ended)
        new: list[dict[str, Any]] = []
        with self.database.reading() as connection:
            for row in connection.execute(query):
                kind = f"fine_tuning.job.{row.state}"
                if kind in row.event_types:
                    mark = hashlib.sha256(f"{row.id}.{kind}.{row.ended!r}.{row.hook}".encode()).hexdigest()[:24]
                    event = {"id": f"evt_{mark}", "object": "event", "created_at": int(row.ended), "type": kind,
                             "data": {"id": row.id}}  # fmt: skip
                    new.append({"id": f"evt_{mark}", "webhook_id": row.hook, "event": event, "attempts": 0,
                                "next_at": time.time()})  # fmt: skip
            known = set(connection.execute(select(deliveries.c.id)).scalars()) if new else set()
        fresh = [found for found in new if found["id"] not in known]
        for found in fresh:
            with self.database.writing() as connection:
                if connection.execute(select(deliveries.c.id).where(deliveries.c.id == found["id"])).first() is None:
                    connection.execute(insert(deliveries).values(found))
        return len(fresh)

    def due(self) -> Sequence[Delivery]:
        """Take the deliveries whose time has come; until they are settled no other process takes them."""
        now = time.time()
        late = update(deliveries).where(deliveries.c.next_at <= now).values(next_at=now + _CLAIMED_S)
        with self.database.writing() as connection:
            return [_delivery(row) for row in connection.execute(late.returning(deliveries)).all()]

    def settle(self, delivery: Delivery, problem: str | None) -> None:
        """Note that a delivery arrived, or when it is tried again; after the last attempt it is given up."""
        attempts = delivery.attempts + 1
        more = problem is not None and attempts <= len(_WAITS_S)
        values = {
            "attempts": attempts, "error": problem, "delivered": time.time() if problem is None else None,
            "next_at": time.time() + _WAITS_S[attempts - 1] if more else None,
        }  # fmt: skip
        with self.database.writing() as connection:
            connection.execute(update(deliveries).where(deliveries.c.id == delivery.id).values(values))

    def deliveries_of(self, webhook_id: str) -> Sequence[Delivery]:
        """Return what was sent or is to be sent to an endpoint."""
        with self.database.reading() as connection:
            query = select(deliveries).where(deliveries.c.webhook_id == webhook_id)
            return [_delivery(row) for row in connection.execute(query)]

    def _write(self, webhook_id: str, values: dict[str, Any]) -> None:
        if values:
            with self.database.writing() as connection:
                connection.execute(update(webhooks).where(webhooks.c.id == webhook_id).values(values))


def _check_types(given: Sequence[str]) -> None:
    if wrong := next((kind for kind in given if kind not in EVENT_TYPES), None):
        raise InputError(f"'event_types' cannot have {wrong[:80]!r}; this server tells of {', '.join(EVENT_TYPES)}.")
    if not given:
        raise InputError(f"'event_types' is empty; this server tells of {', '.join(EVENT_TYPES)}.")


def _webhook(row: Row[Any]) -> Webhook:
    return Webhook.model_validate(dict(row._mapping) | {"event_types": tuple(row.event_types)})


def _delivery(row: Row[Any]) -> Delivery:
    return Delivery.model_validate(dict(row._mapping))
