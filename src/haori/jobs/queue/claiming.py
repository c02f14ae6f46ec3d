"""The claim: one statement that takes the next job for a worker, so that no two workers ever take the same.

Within a priority the account with the fewest running jobs comes first; of those the one whose last job began the
longest ago; of its jobs the oldest. An account that submits a thousand jobs therefore delays its own alone.

PostgreSQL passes over rows that another claim holds (FOR UPDATE SKIP LOCKED); SQLite lets one writer in at a time.
"""

import time
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Float, FromClause, String, and_, bindparam, func, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from haori.jobs.database.connection import Database
from haori.jobs.database.tables import jobs
from haori.jobs.queue.clock import lease_now
from haori.jobs.queue.records import Requirements

__all__ = ["claim_statement", "claim_values"]

_ANY_MEMORY = 2**62


def claim_values(worker: str, lease_s: float, offers: Requirements) -> dict[str, Any]:
    """Return the values that the claim statement is executed with."""
    memory = _ANY_MEMORY if offers.memory_bytes is None else offers.memory_bytes
    now = time.time()
    return {"claimer": worker, "lease_s": lease_s, "has": offers.device or "cpu", "memory": memory, "now": now}


def claim_statement(database: Database) -> ReturningUpdate[tuple[Any, ...]]:
    """Return the statement that takes the next job and returns its row; no row if there is none for this worker.

    It is made once, which takes longer than to execute it, and executed with `claim_values`.
    The columns that it looks at are those of the index `ix_jobs_claim`, so a long queue is read from that alone, once.
    """
    queued, other, chosen = jobs.alias("queued"), jobs.alias("other"), jobs.alias("chosen")
    waiting = select(queued.c.owner).where(_claimable(queued)).distinct().cte("waiting").prefix_with("MATERIALIZED")
    share = select(
        waiting.c.owner,
        select(func.count())
        .where(other.c.owner == waiting.c.owner, other.c.state == "running")
        .scalar_subquery()
        .label("running"),
        select(func.max(other.c.started)).where(other.c.owner == waiting.c.owner).scalar_subquery().label("last"),
    )
    shares = share.cte("shares").prefix_with("MATERIALIZED")
    first = (
        select(chosen.c.id)
        .join(shares, shares.c.owner == chosen.c.owner)
        .where(_claimable(chosen))
        .order_by(
            chosen.c.priority.desc(), shares.c.running, func.coalesce(shares.c.last, 0.0), chosen.c.created, chosen.c.id
        )
        .limit(1)
        .with_for_update(skip_locked=True, of=chosen)
    )
    return (
        update(jobs)
        .where(jobs.c.id == first.scalar_subquery())
        .values(
            state="running",
            worker=bindparam("claimer", type_=String),
            lease_until=lease_now(database) + bindparam("lease_s", type_=Float),
            fence=jobs.c.fence + 1,
            attempts=jobs.c.attempts + 1,
            started=func.coalesce(jobs.c.started, bindparam("now", type_=Float)),
        )
        .returning(*jobs.c)
    )


def _claimable(table: FromClause) -> ColumnElement[bool]:
    """Say of a job whether it waits, is due, and needs nothing that the worker lacks; every worker has a CPU."""
    device, memory = table.c.device, table.c.memory_bytes
    return and_(
        table.c.state == "queued",
        table.c.not_before <= bindparam("now", type_=Float),
        or_(device.is_(None), device == "cpu", device == bindparam("has", type_=String)),
        or_(memory.is_(None), memory <= bindparam("memory", type_=BigInteger)),
    )
