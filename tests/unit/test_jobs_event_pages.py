"""A page of a job's events reads its own rows from the database, however many there are; on both databases."""

from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import event, insert

from haori.core.errors import InputError
from haori.jobs.database.connection import Database, open_database
from haori.jobs.database.tables import events
from haori.jobs.files import FileStore
from haori.jobs.fine_tuning.service import FineTuning, event_id
from haori.jobs.model_names import ModelNames
from haori.jobs.queue.store import JobStore
from haori.server.together.job_events import every_event

COUNT = 5000


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'haori.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    opened = open_database(url)
    yield opened
    opened.close()


@pytest.fixture
def tuning(database: Database) -> FineTuning:
    return FineTuning(JobStore(database), FileStore(database), ModelNames(database), None)


@pytest.fixture
def fetched(database: Database) -> Counter:
    """How many rows drivers hand out from now on, counted where each has them."""
    count: Counter = Counter()

    def watch(connection, _):
        def one(cursor, row):
            count["rows"] += 1
            return row

        connection.row_factory = one

    def add(connection, cursor, *_):
        count["rows"] += max(cursor.rowcount, 0)

    database.engine.dispose()
    if database.is_sqlite:
        event.listen(database.engine, "connect", watch)
    else:
        event.listen(database.engine, "after_cursor_execute", add)
    return count


def filled(tuning: FineTuning, count: int):
    job = tuning.store.submit("fine_tune", {}, job_id="ftjob-a")
    rows = [{"job_id": job.id, "n": n, "at": float(n), "level": "info", "type": "metrics" if n % 10 else "message",
             "message": str(n), "data": None} for n in range(1, count + 1)]  # fmt: skip
    with tuning.store.database.writing() as connection:
        connection.execute(insert(events), rows)
    return job


def test_a_page_reads_its_own_rows_alone(tuning: FineTuning, fetched: Counter):
    job = filled(tuning, COUNT)
    fetched.clear()
    page, more = tuning.events(job, after=None, limit=20)
    assert [one.n for one in page] == list(range(COUNT, COUNT - 20, -1)) and more
    assert 21 <= fetched["rows"] <= 25, "the page, one row that says whether there are more, and what a connection asks"
    seen, after = [], None
    fetched.clear()
    while True:
        page, more = tuning.events(job, after=after, limit=999)
        seen += [one.n for one in page]
        if not more:
            break
        after = event_id(page[-1])
    assert seen == list(range(COUNT, 0, -1))
    assert fetched["rows"] < COUNT + 6 * 3
    assert len(tuning.store.events(job.id, limit=COUNT, type="message")) == COUNT // 10


def test_what_is_no_event_of_the_job_is_told(tuning: FineTuning):
    job = filled(tuning, 3)
    last, more = tuning.events(job, after="ftevent-a-1", limit=5)
    assert (list(last), more) == ([], False)
    for after in ("ftevent-a-4", "ftevent-a-0", "ftevent-a-01", "ftevent-b-1", "ftevent-a-", "ftevent-a-²", "1", "",
                  "ftevent-a-99999999999999999999"):  # fmt: skip
        with pytest.raises(InputError, match="no event of the job 'ftjob-a'"):
            tuning.events(job, after=after, limit=5)


def test_all_events_of_a_type_are_read_over_pages(tuning: FineTuning):
    job = filled(tuning, COUNT)
    found = [event.n for event in every_event(tuning.store, job.id, "metrics")]
    assert found == [n for n in range(1, COUNT + 1) if n % 10]
