"""The queue in the database: every change of a job is one short transaction.

    queued -> running -> succeeded | failed | cancelled
       ^         |
       +---------+  released: its worker was told to stop, or is gone; goes on from its last checkpoint

What a worker writes carries the fence of its claim. Once another attempt has begun, or the job was released, such a
write changes nothing and the worker is told so. What a job does, and how it is run, the store does not know.
"""

import math
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Float,
    Row,
    Select,
    Update,
    and_,
    bindparam,
    case,
    delete,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from haori.core.errors import InputError
from haori.core.settings import settings
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import jobs
from haori.jobs.queue import event_log
from haori.jobs.queue.claiming import claim_statement, claim_values
from haori.jobs.queue.clock import lease_now
from haori.jobs.queue.deaths import requeue_lost, settle_death
from haori.jobs.queue.event_log import NewEvent, append_events
from haori.jobs.queue.records import ENDED, Flags, Job, JobError, JobEvent, JobNotFoundError, Level, Requirements
from haori.jobs.queue.transitions import Action, transition

__all__ = ["JobStore"]

_ID = re.compile(r"[A-Za-z0-9][\w-]{0,63}")
_RECOVERED_S = 1.0
_PRIORITIES = range(-100, 101)

# Made once: to make a statement takes longer than to execute it, and the queue is locked meanwhile.
_ENDING = update(jobs).where(
    jobs.c.id == bindparam("job"), jobs.c.fence == bindparam("held"), jobs.c.state == "running"
)
_ENDED = {"ended": bindparam("moment", type_=Float), "worker": None, "lease_until": None}
_GIVEN = bindparam("given", type_=jobs.c.result.type)
_FINISH = _ENDING.values(state="succeeded", result=_GIVEN, tokens=bindparam("trained", type_=BigInteger), **_ENDED)
_FAIL = _ENDING.values(state="failed", error=_GIVEN, **_ENDED)


class JobStore:
    """Jobs in the database, and their folders.

    Args:
        database: The open database.
        folder: Folder of everything that jobs keep; by default the one of the settings.
    """

    def __init__(self, database: Database, folder: Path | None = None) -> None:
        self.database = database
        self.folder = (settings().jobs if folder is None else folder).absolute()
        self._claim, self._recovered = claim_statement(database), -math.inf

    def submit(
        self,
        kind: str,
        spec: dict[str, Any],
        *,
        owner: str = "local",
        priority: int = 0,
        requirements: Requirements | None = None,
        idempotency_key: str | None = None,
        rows: int = 0,
        tokens: int = 0,
        job_id: str | None = None,
        not_before: float = 0.0,
        max_attempts: int = 3,
        admit: Callable[[Connection], None] | None = None,
    ) -> Job:
        """Put a job in the queue.

        Args:
            kind: What it is, as in `kinds.KINDS`.
            spec: JSON data for its kind.
            owner: The account it belongs to.
            priority: Higher ones go first, -100 to 100.
            requirements: What it needs of a worker.
            idempotency_key: The same key of an account gives the same job back, however often it is submitted.
            rows: Training rows.
            tokens: Tokens to be trained on, all epochs together.
            job_id: Its id, if the caller has one.
            not_before: Seconds since 1970 before which it does not begin.
            max_attempts: Attempts that may die (released ones do not count) before it fails.
            admit: Called in the transaction, before the job is put in; raises if the account may not have it.

        Raises:
            InputError: The key was used for another job, or a value is out of range.
            HaoriError: What `admit` raises.
        """
        identity = job_id or f"job-{secrets.token_hex(8)}"
        needs = requirements or Requirements()
        if not _ID.fullmatch(identity):
            raise InputError(f"A job cannot be called {identity!r}: letters, digits, '_' and '-', at most 64.")
        if priority not in _PRIORITIES:
            raise InputError(f"The priority of a job is from -100 to 100, and {priority} was given.")
        row = {
            "id": identity, "owner": owner, "kind": kind, "state": "queued", "priority": priority,
            "created": time.time(), "not_before": not_before, "spec": spec, "folder": identity,
            "device": needs.device, "memory_bytes": needs.memory_bytes, "idempotency_key": idempotency_key,
            "rows": rows, "tokens": tokens, "max_attempts": max_attempts,
        }  # fmt: skip
        with self.database.writing() as connection:
            if idempotency_key is not None and (held := self._keyed(connection, owner, idempotency_key)) is not None:
                return _same(held, row)
            if admit is not None:
                admit(connection)
            insert = sqlite.insert if self.database.is_sqlite else postgresql.insert
            put = insert(jobs).values(row).on_conflict_do_nothing(index_elements=["owner", "idempotency_key"])
            if connection.execute(put).rowcount == 0 and idempotency_key is not None:  # another was quicker
                return _same(self._keyed(connection, owner, idempotency_key), row)
            return self._job(connection.execute(select(jobs).where(jobs.c.id == identity)).one())

    def find(self, job_id: str, owner: str | None = None) -> Job:
        """Return a job.

        Args:
            job_id: Its id.
            owner: The account that asks; None for anybody.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
        """
        with self.database.reading() as connection:
            return self._find(connection, job_id, owner)

    def list(
        self,
        owner: str | None = None,
        *,
        kinds: Sequence[str] | None = None,
        states: Sequence[str] | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> tuple[tuple[Job, ...], bool]:
        """Return jobs, the newest first, and whether there are more.

        Args:
            owner: Only of this account.
            kinds: Only of these kinds.
            states: Only in these states.
            after: Id of the last job of the page before.
            limit: Jobs at most.

        Raises:
            JobNotFoundError: There is no job `after`.
        """
        asked = select(jobs).order_by(jobs.c.created.desc(), jobs.c.id.desc()).limit(limit + 1)
        for column, wanted in ((jobs.c.kind, kinds), (jobs.c.state, states)):
            asked = asked if wanted is None else asked.where(column.in_(wanted))
        asked = asked if owner is None else asked.where(jobs.c.owner == owner)
        with self.database.reading() as connection:
            if after is not None:
                last = self._find(connection, after, owner)
                older = and_(jobs.c.created == last.created, jobs.c.id < last.id)
                asked = asked.where(or_(jobs.c.created < last.created, older))
            found = [self._job(row) for row in connection.execute(asked)]
        return tuple(found[:limit]), len(found) > limit

    def claim(self, worker: str, *, lease_s: float = 60.0, offers: Requirements | None = None) -> Job | None:
        """Take the next job for a worker until its lease ends; None if there is none that it can do.

        Jobs whose worker let its lease run out are put back, where there is no other and at least every second.
        """
        values = claim_values(worker, lease_s, offers or Requirements(device="cpu"))
        with self.database.writing() as connection:
            row = None
            if time.monotonic() - self._recovered < _RECOVERED_S:
                row = connection.execute(self._claim, values).one_or_none()
            if row is None:
                requeue_lost(self.database, connection, self.folder)
                self._recovered = time.monotonic()
                row = connection.execute(self._claim, values).one_or_none()
        return None if row is None else self._job(row)

    def heartbeat(self, job: Job, lease_s: float = 60.0) -> Flags | None:
        """Renew the lease and return what was asked of the job; None if it is no longer the caller's."""
        renewed = (
            update(jobs)
            .where(*_held_by(job))
            .values(lease_until=lease_now(self.database) + lease_s)
            .returning(jobs.c.cancel, jobs.c.pause)
        )
        with self.database.writing() as connection:
            row = connection.execute(renewed).one_or_none()
        return None if row is None else Flags(row.cancel, row.pause)

    def flags(self, job: Job) -> Flags | None:
        """Return what was asked of the job, as `heartbeat` does, without renewing the lease."""
        with self.database.reading() as connection:
            row = connection.execute(select(jobs.c.cancel, jobs.c.pause).where(*_held_by(job))).one_or_none()
        return None if row is None else Flags(row.cancel, row.pause)

    def set_progress(self, job: Job, progress: dict[str, Any]) -> bool:
        """Replace the latest progress; False if the job is no longer the caller's."""
        with self.database.writing() as connection:
            return bool(connection.execute(update(jobs).where(*_held_by(job)).values(progress=progress)).rowcount)

    def add_event(
        self, job: Job | str, level: Level, type: str, message: str, data: dict[str, Any] | None = None
    ) -> bool:
        """Append an event; of a running attempt, given as its job, only while that is the caller's."""
        return self.add_events(job, [NewEvent(level, type, message, data)])

    def add_events(self, job: Job | str, new: Sequence[NewEvent]) -> bool:
        """Append events in order, as `add_event` does."""
        asked = select(jobs.c.id).where(*([jobs.c.id == job] if isinstance(job, str) else _held_by(job)))
        with self.database.writing() as connection:
            held = connection.execute(asked.with_for_update()).one_or_none()
            if held is not None:
                append_events(connection, held.id, list(new))
        return held is not None

    def events(self, job_id: str, after_n: int = 0, limit: int = 1000, type: str | None = None) -> tuple[JobEvent, ...]:
        """Return the events of a job behind its `after_n`th, the oldest first; of one type, if that is given."""
        with self.database.reading() as connection:
            return tuple(event_log.events_of(connection, job_id, after_n, limit, type))

    def events_newest(self, job_id: str, limit: int, before_n: int | None = None) -> tuple[JobEvent, ...]:
        """Return the newest events of a job, or the newest before its `before_n`th, the oldest of them first."""
        with self.database.reading() as connection:
            return tuple(event_log.newest_of(connection, job_id, limit, before_n))

    def events_after(self, number: int, owner: str | None = None, limit: int = 1000) -> tuple[JobEvent, ...]:
        """Return the events of all jobs, or those of one account, behind a number, the oldest first."""
        with self.database.reading() as connection:
            return tuple(event_log.events_after(connection, number, owner, limit))

    def finish(self, job: Job, result: dict[str, Any], *, tokens: int | None = None) -> bool:
        """End a job with its result (and the tokens it trained on); False if it is no longer the caller's."""
        event = NewEvent("info", "message", "The job succeeded.")
        return self._end(job, event, _FINISH, given=result, trained=job.tokens if tokens is None else tokens)

    def fail(self, job: Job, sentence: str, kind: str = "HaoriError") -> bool:
        """End a job with an error; False if it is no longer the caller's."""
        error = JobError(sentence=sentence, kind=kind).model_dump()
        return self._end(job, NewEvent("error", "message", sentence), _FAIL, given=error)

    def died(self, job: Job, sentence: str) -> bool:
        """Say that the job's process ended without a result: it goes back to the queue, or fails.

        It fails when it has no attempt left, or died for the second time at the same place.
        """
        with self.database.writing() as connection:
            row = connection.execute(select(jobs).where(*_held_by(job)).with_for_update()).one_or_none()
            if row is not None:
                settle_death(connection, row, sentence, self.folder / row.folder)
        return row is not None

    def release(self, job: Job, delay_s: float = 0.0, *, count_attempt: bool = False) -> bool:
        """Give a job back: to the queue, or cancelled or paused if that was asked; False if it is not the caller's."""
        free = dict.fromkeys(("worker", "lease_until"))
        state = case((jobs.c.cancel, "cancelled"), (jobs.c.pause, "paused"), else_="queued")
        changed = (
            update(jobs)
            .where(*_held_by(job))
            .values(
                state=state, not_before=time.time() + delay_s, attempts=jobs.c.attempts - (0 if count_attempt else 1),
                ended=case((jobs.c.cancel, time.time()), else_=None), **free,
            )
            .returning(jobs.c.id, jobs.c.state)
        )  # fmt: skip
        said = {
            "cancelled": "The job was cancelled.",
            "paused": "The job was paused.",
            "queued": "The job waits again.",
        }
        with self.database.writing() as connection:
            row = connection.execute(changed).one_or_none()
            if row is not None:
                append_events(connection, row.id, [NewEvent("info", "message", said[row.state])])
        return row is not None

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """End a job; a running one saves nothing more and ends at its worker's next look.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
            InputError: It has ended.
        """
        return self._change(job_id, owner, "cancel")

    def pause(self, job_id: str, owner: str | None = None) -> Job:
        """Hold a job back; a running one saves a checkpoint first.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
            InputError: It has ended.
        """
        return self._change(job_id, owner, "pause")

    def resume(self, job_id: str, owner: str | None = None) -> Job:
        """Let a paused job go on.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
            InputError: It has ended.
        """
        return self._change(job_id, owner, "resume")

    def retry(self, job_id: str, owner: str | None = None) -> Job:
        """Try a failed or cancelled job again, from its last checkpoint.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
            InputError: It neither failed nor was cancelled.
        """
        return self._change(job_id, owner, "retry")

    def prune(self, *, older_than_s: float, owner: str | None = None, job_id: str | None = None) -> tuple[str, ...]:
        """Delete jobs that ended so long ago, or the one given if it did, with folders and events; return their ids."""
        old = [jobs.c.state.in_(ENDED), jobs.c.ended <= time.time() - older_than_s]
        old += [] if job_id is None else [jobs.c.id == job_id]
        gone = delete(jobs).where(*old, *([] if owner is None else [jobs.c.owner == owner]))
        with self.database.writing() as connection:
            found = connection.execute(gone.returning(jobs.c.id, jobs.c.folder)).all()
        for row in found:
            shutil.rmtree(self.folder / row.folder, ignore_errors=True)
        return tuple(row.id for row in found)

    def _change(self, job_id: str, owner: str | None, action: Action) -> Job:
        with self.database.writing() as connection:
            change = transition(self._find(connection, job_id, owner, lock=True), action)
            if change.values:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(change.values))
                append_events(connection, job_id, [NewEvent("info", "message", change.message)])
            return self._find(connection, job_id, owner)

    def _end(self, job: Job, event: NewEvent, statement: Update, **values: Any) -> bool:
        values |= {"job": job.id, "held": job.fence, "moment": time.time()}
        with self.database.writing() as connection:
            changed = connection.execute(statement, values).rowcount
            if changed:
                append_events(connection, job.id, [event])
        return bool(changed)

    def _keyed(self, connection: Connection, owner: str, key: str) -> Job | None:
        row = connection.execute(select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)).one_or_none()
        return None if row is None else self._job(row)

    def _find(self, connection: Connection, job_id: str, owner: str | None, *, lock: bool = False) -> Job:
        asked: Select[Any] = select(jobs).where(jobs.c.id == job_id)
        row = connection.execute(asked.with_for_update() if lock else asked).one_or_none()
        if row is None or (owner is not None and row.owner != owner):
            raise JobNotFoundError(f"There is no job {job_id!r}; `haori jobs list` shows those that there are.")
        return self._job(row)

    def _job(self, row: Row[Any]) -> Job:
        held = dict(row._mapping)
        needs = Requirements(device=held.pop("device"), memory_bytes=held.pop("memory_bytes"))
        for name in ("not_before", "lease_until", "idempotency_key"):
            del held[name]
        return Job.model_validate({**held, "requirements": needs, "folder": self.folder / held["folder"]})


def _held_by(job: Job) -> tuple[ColumnElement[bool], ...]:
    """Return what is true of a job's row as long as this claim of it stands."""
    return (jobs.c.id == job.id, jobs.c.fence == job.fence, jobs.c.state == "running")


def _same(held: Job | None, row: dict[str, Any]) -> Job:
    """Return the job that was submitted before under the same key.

    Raises:
        InputError: It is another job.
    """
    if held is None or (held.kind, held.spec) != (row["kind"], row["spec"]):
        raise InputError(
            f"The idempotency key {row['idempotency_key']!r} was used for another job; give each job a key of its own."
        )
    return held
