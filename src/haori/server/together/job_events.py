"""All events of a job, read from the database page by page."""

from collections.abc import Iterator

from haori.jobs.queue.records import JobEvent
from haori.jobs.queue.store import JobStore

__all__ = ["every_event"]

_PAGE = 1000


def every_event(store: JobStore, job_id: str, type: str) -> Iterator[JobEvent]:
    """Yield the events of one type, the oldest first."""
    after = 0
    while page := store.events(job_id, after, _PAGE, type):
        yield from page
        after = page[-1].n
