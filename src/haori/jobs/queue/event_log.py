"""The append-only log of events: each has a number over all jobs, for streams, and one within its job."""

import time
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, func, insert, select

from haori.jobs.database.tables import events, jobs
from haori.jobs.queue.records import JobEvent, Level

__all__ = ["NewEvent", "append_events", "events_after", "events_of", "newest_of"]


class NewEvent(NamedTuple):
    """An event before it has its numbers."""

    level: Level
    type: str
    message: str
    data: dict[str, Any] | None = None


_earlier = events.alias("earlier")
_APPEND = insert(events).values(
    job_id=bindparam("job"),
    n=select(func.coalesce(func.max(_earlier.c.n), 0) + 1)
    .where(_earlier.c.job_id == bindparam("job"))
    .scalar_subquery(),
    at=bindparam("moment"),
    level=bindparam("given_level"),
    type=bindparam("given_type"),
    message=bindparam("text"),
    data=bindparam("given_data", type_=events.c.data.type),
)


def append_events(connection: Connection, job_id: str, new: list[NewEvent]) -> None:
    """Append events of one job; the caller holds its row, so that numbers are given once."""
    rows = [
        {
            "job": job_id, "moment": time.time(), "given_level": one.level, "given_type": one.type,
            "text": _text(one.message), "given_data": one.data,
        }
        for one in new
    ]  # fmt: skip
    for row in rows:
        connection.execute(_APPEND, row)


def _text(message: str) -> str:
    """Return a message as every database takes it: without NUL and halves of characters."""
    return message.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def events_of(connection: Connection, job_id: str, after_n: int, limit: int, type: str | None = None) -> list[JobEvent]:
    """Return the events of a job behind its `after_n`th, the oldest first; of one type, if that is given."""
    asked = select(events).where(events.c.job_id == job_id, events.c.n > after_n).order_by(events.c.n).limit(limit)
    asked = asked if type is None else asked.where(events.c.type == type)
    return [JobEvent.model_validate(dict(row._mapping)) for row in connection.execute(asked)]


def newest_of(connection: Connection, job_id: str, limit: int, before_n: int | None = None) -> list[JobEvent]:
    """Return the newest events of a job, or the newest before its `before_n`th, the oldest of them first."""
    asked = select(events).where(events.c.job_id == job_id).order_by(events.c.n.desc()).limit(limit)
    asked = asked if before_n is None else asked.where(events.c.n < before_n)
    return [JobEvent.model_validate(dict(row._mapping)) for row in connection.execute(asked)][::-1]


def events_after(connection: Connection, number: int, owner: str | None, limit: int) -> list[JobEvent]:
    """Return the events of all jobs, or those of one account, behind a number, the oldest first."""
    asked = select(events).where(events.c.number > number).order_by(events.c.number).limit(limit)
    if owner is not None:
        asked = asked.join(jobs, jobs.c.id == events.c.job_id).where(jobs.c.owner == owner)
    return [JobEvent.model_validate(dict(row._mapping)) for row in connection.execute(asked)]
