"""What becomes of a job whose process or worker is gone: another attempt, or its end.

An attempt that dies leaves a note in the job's events of the step it had reached. A job that dies where it died before
would do so for ever, and take its workers with it, so it fails with the last lines of its log.
"""

import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, select, update

from haori.jobs.database.connection import Database
from haori.jobs.database.tables import events, jobs
from haori.jobs.queue.clock import ran_out
from haori.jobs.queue.event_log import NewEvent, append_events
from haori.jobs.queue.folders import last_log_lines
from haori.jobs.queue.records import JobError

__all__ = ["requeue_lost", "settle_death"]


def requeue_lost(database: Database, connection: Connection, folder: Path) -> None:
    """Settle every job whose worker let its lease run out; another claim may be doing the same."""
    lost = select(jobs).where(jobs.c.state == "running", ran_out(database, jobs.c.lease_until))
    for row in connection.execute(lost.with_for_update(skip_locked=True)).all():
        settle_death(connection, row, f"Its worker {row.worker!r} gave no sign of life.", folder / row.folder)


def settle_death(connection: Connection, row: Row[Any], sentence: str, folder: Path) -> None:
    """Put a job whose attempt died back in the queue, or end it; the caller holds its row.

    It ends when it has no attempt left, or, with three attempts, died for the second time at the same step.
    """
    step = int((row.progress or {}).get("step", 0))
    before = _deaths_at(connection, row.id, step, row.attempts)
    values: dict[str, Any] = {"worker": None, "lease_until": None}
    note = NewEvent("warn", "message", sentence, {"died_at": step, "attempt": row.attempts})
    if row.cancel or row.pause:
        state = "cancelled" if row.cancel else "paused"
        values |= {"state": state, "ended": time.time() if row.cancel else None}
        found = [note, NewEvent("info", "message", f"The job was {state}.")]
    elif row.attempts < row.max_attempts and before + 1 < max(2, row.max_attempts - 1):
        values |= {"state": "queued"}
        found = [note]
    else:
        lines = last_log_lines(folder, row.fence)
        times = f"{row.attempts} attempts" if row.attempts >= row.max_attempts else f"it died there {before + 1} times"
        end = f" The last lines of its log: {lines}" if lines else ""
        reason = f"The job was given up at step {step} after {times}. {sentence}{end}"
        error = JobError(sentence=reason, kind="JobDied")
        values |= {"state": "failed", "ended": time.time(), "error": error.model_dump()}
        found = [note, NewEvent("error", "message", reason)]
    connection.execute(update(jobs).where(jobs.c.id == row.id, jobs.c.fence == row.fence).values(values))
    append_events(connection, row.id, found)


def _deaths_at(connection: Connection, job_id: str, step: int, attempt: int) -> int:
    """Return how many attempts in a row died at this step before this one, since the job was last tried anew."""
    warned = select(events.c.data).where(events.c.job_id == job_id, events.c.level == "warn")
    count = 0
    for data in connection.execute(warned.order_by(events.c.n.desc())).scalars():
        if isinstance(data, dict) and "died_at" in data:
            if data["died_at"] != step or data["attempt"] >= attempt:
                break
            count, attempt = count + 1, data["attempt"]
    return count
