"""Jobs on a real Ray cluster on this machine: finished, stopped in time to save, cancelled, and their worker killed."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from haori.core.errors import UnavailableError
from haori.jobs.database.connection import open_database
from haori.jobs.queue.launching import launcher_named
from haori.jobs.queue.store import JobStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one machine; that of RAY_ADDRESS where there is one already."""
    ray = pytest.importorskip("ray")
    given = os.environ.get("RAY_ADDRESS")
    if given:
        yield given
        return
    context = ray.init(include_dashboard=True, num_cpus=2)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture
def store(tmp_path, haori_home, cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    database = open_database(f"sqlite:///{tmp_path / 'haori.db'}")
    yield JobStore(database)
    database.close()


@contextmanager
def worker(store, name="w", lease_s=20.0):
    """A worker in a process of its own, which gives its jobs to Ray."""
    url = store.database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.queue_tasks", url, name, "0.1", str(lease_s), "ray"]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def until(condition, seconds=60.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.05)
    return found


def ended(store, job, *states):
    return until(lambda: (found := store.find(job.id)).state in states and found)


def known_to_ray(cluster, job):
    """What Ray tells of a job: an entry for each attempt."""
    from ray.job_submission import JobSubmissionClient

    return [one for one in JobSubmissionClient(cluster).list_jobs() if f"{job.id}/" in one.entrypoint]


def test_a_job_is_done_and_ray_is_told_no_password(store, cluster, monkeypatch):
    monkeypatch.setenv("HAORI_PASSWORD_OF_A_TEST", "it's $ecret")
    job = store.submit("count", {"to": 5})
    with worker(store):
        found = ended(store, job, "succeeded", "failed")
    assert found.result == {"counted": 5, "tokens": 50, "path": None}, found.error
    [one] = known_to_ray(cluster, job)
    told = repr(one)
    assert one.status == "SUCCEEDED" and str(found.folder) in told
    assert "ecret" not in told and "HAORI_" not in told
    assert not list(found.folder.rglob("environment.sh"))
    assert [event.message for event in store.events(job.id)][-1] == "The job succeeded."


def test_a_paused_job_has_time_to_save_and_a_cancelled_one_ends(store, cluster):
    slow, long = store.submit("slow", {"seconds": 6.0}), store.submit("count", {"to": 100_000})
    with worker(store):
        until(lambda: store.find(slow.id).progress)
        store.pause(slow.id)
        found = ended(store, slow, "paused")
        [saved] = found.folder.glob("attempt-*/work/saved.txt")
        assert saved.read_text() == "whole", "Ray by itself kills what has not ended after 3 seconds"
        until(lambda: store.find(long.id).progress)
        store.cancel(long.id)
        found = ended(store, long, "cancelled")
    assert [one.status for one in known_to_ray(cluster, long)] == ["STOPPED"]
    assert not [event for event in store.events(long.id) if event.level != "info"]


def test_the_worker_is_killed_and_another_goes_on(store, cluster):
    job = store.submit("count", {"to": 500})
    with worker(store, "first", lease_s=4.0) as process:
        until(lambda: (store.find(job.id).progress or {}).get("step", 0) > 20)
        process.kill()
        process.wait(10)
    with worker(store, "second", lease_s=4.0):
        found = ended(store, job, "succeeded", "failed")
    assert (found.state, found.attempts, found.result["counted"]) == ("succeeded", 2, 500)
    [file] = found.folder.glob("attempt-*/work/steps.txt")
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [int(step) for _, step in lines] == list(range(1, 501)), "nothing is lost and nothing done twice"
    assert len({process for process, _ in lines}) == 2
    statuses = [one.status for one in known_to_ray(cluster, job)]
    assert sorted(statuses) == ["FAILED", "SUCCEEDED"], "the first process ended by itself, as nobody renewed its lease"


def test_a_cluster_that_is_not_reached_is_waited_for(store, cluster, tmp_path, monkeypatch):
    launcher = launcher_named("ray")
    assert not launcher.alive("raysubmit_none"), "one that the cluster does not know has ended"
    launcher.stop("raysubmit_none")
    assert launcher.ending("raysubmit_none") == "is gone"
    launcher._client._address = "http://127.0.0.1:9"
    assert launcher.alive("raysubmit_none"), "it may well run"
    launcher.stop("raysubmit_none")
    with pytest.raises(UnavailableError, match="Ray did not take the job"):
        launcher.start(["true"], tmp_path, {})
    assert not (tmp_path / "environment.sh").exists()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"RAY_ADDRESS is http://127.0.0.1:9"):
        launcher_named("ray")
