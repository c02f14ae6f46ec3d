"""What an account may have of jobs, rows, tokens and bytes; counted where it is written."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from haori.core.errors import InputError
from haori.jobs.database.connection import Database, open_database
from haori.jobs.database.tables import files, jobs, uploads
from haori.jobs.quotas import QuotaError, Quotas

DAY_S = 24 * 3600.0


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(f"sqlite:///{tmp_path / 'haori.db'}")


def job(name: str, state: str = "queued", *, owner: str = "a", tokens: int = 100, ended: float | None = None):
    return {
        "id": name, "owner": owner, "kind": "train", "state": state, "created": 1.0, "spec": {},
        "folder": name, "tokens": tokens, "ended": ended,
    }  # fmt: skip


def test_jobs_that_have_not_ended_count_of_this_account_alone(database: Database):
    quotas = Quotas(jobs=2)
    with database.writing() as held:
        rows = [job("1"), job("2", "succeeded"), job("3", "failed"), job("4", owner="b"), job("5", owner="b")]
        held.execute(insert(jobs), rows)
        quotas.check_job(held, "a", rows=1, tokens=1)
        held.execute(insert(jobs), [job("6", "paused")])
        with pytest.raises(QuotaError, match="has 2 unfinished jobs and may have 2; wait, or cancel one"):
            quotas.check_job(held, "a", rows=1, tokens=1)


def test_tokens_count_for_thirty_days_and_of_jobs_to_come(database: Database):
    quotas, now = Quotas(tokens=1000), time.time()
    with database.writing() as held:
        rows = [
            job("old", "succeeded", tokens=900, ended=now - 31 * DAY_S),
            job("new", "failed", tokens=500, ended=now - 29 * DAY_S),
            job("next", "running", tokens=300),
        ]
        held.execute(insert(jobs), rows)
        quotas.check_job(held, "a", rows=1, tokens=200)
        with pytest.raises(QuotaError, match="has trained 800 of the 1,000 tokens"):
            quotas.check_job(held, "a", rows=1, tokens=201)
        with pytest.raises(InputError, match="would train 1,001 tokens"):  # waiting would not help
            quotas.check_job(held, "a", rows=1, tokens=1001)


def test_rows_of_one_job(database: Database):
    with database.writing() as held:
        Quotas(rows=10).check_job(held, "a", rows=10, tokens=0)
        with pytest.raises(InputError, match="has 11 training rows"):
            Quotas(rows=10).check_job(held, "a", rows=11, tokens=0)


def test_bytes_of_files_and_of_uploads_under_way(database: Database):
    quotas = Quotas(bytes=1000)
    file = {"filename": "f", "purpose": "fine-tune", "created": 1.0}
    with database.writing() as held:
        kept = {**file, "id": "1", "owner": "a", "bytes": 400, "sha256": "", "status": "processed"}
        held.execute(insert(files), [kept, {**kept, "id": "2", "owner": "b"}])
        coming = {**file, "id": "u", "owner": "a", "bytes": 300, "mime_type": "x", "expires": 2.0, "status": "pending"}
        held.execute(insert(uploads), [coming, {**coming, "id": "v", "status": "cancelled"}])
        quotas.check_bytes(held, "a", 300)
        with pytest.raises(QuotaError, match="keeps 700 bytes of files and may keep 1,000"):
            quotas.check_bytes(held, "a", 301)
        with pytest.raises(InputError, match="has 1,001 bytes"):
            quotas.check_bytes(held, "a", 1001)
        Quotas().check_bytes(held, "a", 10**12)


def test_two_requests_at_once_cannot_both_take_the_last_job(database: Database):
    def submit(n: int) -> bool:
        try:
            with database.writing() as held:
                Quotas(jobs=3).check_job(held, "a", rows=1, tokens=1)
                held.execute(insert(jobs), [job(str(n))])
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(submit, range(16)))
    with database.reading() as held:
        assert sum(done) == 3 == held.execute(select(func.count()).select_from(jobs)).scalar_one()
