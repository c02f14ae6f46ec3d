"""The service's database: opened as this version's, on SQLite and PostgreSQL, or refused with a sentence."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select

from haori.core.errors import InputError, StorageError
from haori.jobs.database import connection
from haori.jobs.database.connection import open_database
from haori.jobs.database.tables import events, jobs, metadata

JOB = {
    "id": "job-1", "owner": "a", "kind": "train", "state": "queued", "created": 1.0, "spec": {"n": [1]},
    "folder": "job-1",
}  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"sqlite:///{tmp_path / 'x' / 'haori.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    )


def test_migrations_make_the_tables_of_this_version(url: str):
    for _ in range(2):  # the second finds them
        database = open_database(url)
        with database.reading() as held:
            assert compare_metadata(MigrationContext.configure(held), metadata) == []
        database.close()


def test_a_row_comes_back_and_events_count_over_all_jobs(url: str):
    database = open_database(url)
    with database.writing() as held:
        held.execute(insert(jobs), [JOB, {**JOB, "id": "job-2"}])
        for job, n in (("job-1", 1), ("job-2", 1), ("job-1", 2)):
            row = {"job_id": job, "n": n, "at": 1.5, "level": "info", "type": "message", "message": "x"}
            held.execute(insert(events), row)
    with database.reading() as held:
        assert held.execute(select(jobs.c.spec, jobs.c.fence, jobs.c.cancel)).first() == ({"n": [1]}, 0, False)
        found = held.execute(select(events.c.job_id, events.c.n).order_by(events.c.number)).all()
    assert found == [("job-1", 1), ("job-2", 1), ("job-1", 2)]
    with pytest.raises(StorageError, match="cannot be written"), database.writing() as held:
        held.execute(insert(jobs), [{**JOB, "id": "job-3"}, JOB])
    with database.reading() as held:
        assert len(held.execute(select(jobs.c.id)).all()) == 2  # neither of the two
    database.close()


def test_processes_that_open_it_at_once_migrate_it_once(url: str):
    code = f"from haori.jobs.database.connection import open_database; open_database({url!r}).close()"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    for process in running:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said


def test_a_newer_version_and_what_is_no_database_are_refused(tmp_path: Path):
    file = tmp_path / "haori.db"
    open_database(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as held:
        held.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="written by a newer version of Haori"):
        open_database(f"sqlite:///{file}")
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="cannot be"):
        open_database(f"sqlite:///{file}")


@pytest.mark.parametrize("given", ["mysql://user:secret@host/name", "x", "sqlite://", "sqlite:///:memory:"])
def test_an_address_that_is_none_is_refused_without_its_password(given: str):
    with pytest.raises(InputError, match="give postgresql://user@host/name") as refused:
        open_database(given)
    assert "secret" not in str(refused.value)


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"rootfs / ext4 rw 0 0\nserver:/x {tmp_path}/far nfs4 rw 0 0\nd {tmp_path}/far/near tmpfs rw 0 0\n"
    )
    for name, kind in (("far", "nfs4"), ("far/near", "tmpfs"), ("farther", "ext4")):
        (tmp_path / name).mkdir()
        assert connection._file_system(tmp_path / name, mounts) == kind
    monkeypatch.setattr(connection, "_file_system", lambda folder: "nfs4")
    with pytest.raises(InputError, match=r"network file system \(nfs4\).*postgresql://"):
        open_database(f"sqlite:///{tmp_path / 'far' / 'haori.db'}")
    assert not (tmp_path / "far" / "haori.db").exists()
