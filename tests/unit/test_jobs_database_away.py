"""A PostgreSQL that goes away while work is done: nothing is lost, and clients are told neither address nor reason."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from haori.core.settings import settings
from haori.jobs.database.connection import Database, DatabaseError, in_full, open_database
from haori.jobs.queue import kinds
from haori.jobs.queue.attempt import Pace
from haori.jobs.queue.launching.local import LocalLauncher
from haori.jobs.queue.records import Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.worker import Worker
from haori.server.errors import api_error_of
from tests.postgres import away, postgres  # noqa: F401 - a fixture
from tests.queue_tasks import KINDS

ROOT = Path(__file__).parents[2]
PACE = Pace(lease_s=20, heartbeat_s=0.2, poll_s=0.02, grace_s=0.3)


@pytest.fixture
def store(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:  # noqa: F811
    monkeypatch.setattr(kinds, "KINDS", KINDS)
    monkeypatch.setattr("haori.jobs.queue.worker._SEEN_S", 0.3)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("HAORI_DATABASE", postgres)
    settings.cache_clear()
    database = open_database()
    yield JobStore(database, tmp_path / "jobs")
    database.close()
    settings.cache_clear()


@contextmanager
def working(store: JobStore) -> Iterator[threading.Thread]:
    """A worker in a thread, until the end."""
    ending = threading.Event()
    worker = Worker(store, "w", LocalLauncher(), Requirements(device="cpu"), PACE)
    thread = threading.Thread(target=worker.run, args=(ending.is_set,))
    thread.start()
    try:
        yield thread
    finally:
        ending.set()
        thread.join(20)


def until(condition, seconds: float = 20.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)
    return found


def test_what_clients_are_told_has_no_address_and_the_log_has(store: JobStore, postgres: str):  # noqa: F811
    with away(postgres) as name:
        for ask in (store.list, lambda: store.submit("count", {})):
            with pytest.raises(DatabaseError, match=r"^The database cannot be \w+: it does not answer") as caught:
                ask()
            reply = api_error_of(caught.value)
            assert (reply.status, reply.code, reply.retry_after_s) == (503, "database_unavailable", 1.0)
            assert reply.message == str(caught.value)
            assert name not in reply.message and "/" not in reply.message
            assert name in in_full(caught.value)
    with pytest.raises(DatabaseError, match="refuses what was asked") as caught, store.database.reading() as held:
        held.execute(text("SELECT * FROM nowhere"))
    assert (api_error_of(caught.value).status, caught.value.away) == (500, False)
    assert "nowhere" not in str(caught.value) and "nowhere" in in_full(caught.value)
    assert store.list() == ((), False)


def test_waiting_for_a_connection_in_vain_is_a_sentence_too(store: JobStore):
    """As with more requests at once than the pool has connections, each of them slow."""
    small = Database(store.database.url)
    small.engine.dispose()
    small.engine = create_engine(store.database.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    with small.reading(), pytest.raises(DatabaseError, match="does not answer"), small.reading():
        pass
    small.close()


def test_a_worker_outlives_it_and_its_job_goes_on(store: JobStore, postgres: str):  # noqa: F811
    job = store.submit("count", {"to": 60})
    with working(store) as thread:
        until(lambda: store.find(job.id).progress)
        with away(postgres):
            time.sleep(1.0)  # the worker says several times that it is there, and hears of the job as often
            assert thread.is_alive()
        found = until(lambda: (held := store.find(job.id)).state == "succeeded" and held)
        assert (found.attempts, found.result["counted"]) == (1, 60)
        again = store.submit("count", {"to": 1})
        until(lambda: store.find(again.id).state == "succeeded")


def test_a_job_whose_process_found_it_away_is_done_again(store: JobStore, postgres: str, tmp_path: Path):  # noqa: F811
    go = tmp_path / "go"
    job = store.submit("look", {"go": str(go)})
    with working(store):
        folder = until(lambda: list(store.find(job.id).folder.glob("attempt-1/work/there.txt")))[0].parents[1]
        with away(postgres) as name:
            go.touch()
            until((folder / "result.json").exists)
        found = until(lambda: (held := store.find(job.id)).state == "succeeded" and held)
    assert found.attempts == 2
    said = [event.message for event in store.events(job.id)]
    assert "Its process got no answer from the database." in said
    assert not [message for message in said if name in message]
