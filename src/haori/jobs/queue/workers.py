"""Which workers there are, and whether any of them could do a job."""

from sqlalchemy import delete, not_, select
from sqlalchemy.dialects import postgresql, sqlite

from haori.jobs.database.connection import Database
from haori.jobs.database.tables import workers
from haori.jobs.queue.clock import lease_now, ran_out
from haori.jobs.queue.records import Job, Requirements, WorkerSeen

__all__ = ["forget_worker", "note_worker", "obstacle", "workers_seen"]


def note_worker(database: Database, name: str, offers: Requirements, seconds: float) -> None:
    """Say that a worker is there for so long, and what it has."""
    insert = sqlite.insert if database.is_sqlite else postgresql.insert
    values = {
        "device": offers.device or "cpu", "memory_bytes": offers.memory_bytes,
        "seen_until": lease_now(database) + seconds,
    }  # fmt: skip
    put = insert(workers).values(name=name, **values).on_conflict_do_update(index_elements=["name"], set_=values)
    with database.writing() as connection:
        connection.execute(delete(workers).where(ran_out(database, workers.c.seen_until)))
        connection.execute(put)


def forget_worker(database: Database, name: str) -> None:
    """Say that a worker has ended."""
    with database.writing() as connection:
        connection.execute(delete(workers).where(workers.c.name == name))


def workers_seen(database: Database) -> tuple[WorkerSeen, ...]:
    """Return the workers that are there, by name."""
    asked = select(workers).where(not_(ran_out(database, workers.c.seen_until))).order_by(workers.c.name)
    with database.reading() as connection:
        return tuple(
            WorkerSeen(name=row.name, offers=Requirements(device=row.device, memory_bytes=row.memory_bytes))
            for row in connection.execute(asked)
        )


def obstacle(database: Database, job: Job) -> str | None:
    """Return why no worker could take a waiting job; None if one could, or if it does not wait."""
    if job.state != "queued":
        return None
    seen = workers_seen(database)
    if not seen:
        return "No worker is there; start one with `haori worker`."
    if any(_can_do(job.requirements, one.offers) for one in seen):
        return None
    there = ", ".join(f"{one.name} ({_named(one.offers)})" for one in seen)
    return f"It needs {_named(job.requirements)}, and no worker has that: {there}."


def _can_do(needs: Requirements, offers: Requirements) -> bool:
    """Say whether a worker can do a job, as the claim decides it; every worker has a CPU."""
    unknown = needs.memory_bytes is None or offers.memory_bytes is None
    fits = unknown or needs.memory_bytes <= offers.memory_bytes  # type: ignore[operator]  # neither is None
    return needs.device in (None, "cpu", offers.device) and fits


def _named(one: Requirements) -> str:
    device = one.device or "any device"
    return device if one.memory_bytes is None else f"{device} with {one.memory_bytes / 1e9:.1f} GB"
