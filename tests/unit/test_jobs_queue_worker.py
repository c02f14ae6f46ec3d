"""The worker of the queue with real processes: what it saves, releases, kills and refuses; one of two is killed."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from haori.core.errors import StorageError
from haori.core.events import Said
from haori.jobs.database.connection import open_database
from haori.jobs.database.tables import jobs
from haori.jobs.queue import kinds
from haori.jobs.queue.attempt import Attempt, Pace
from haori.jobs.queue.event_file import EventTail, EventWriter
from haori.jobs.queue.folders import take_over
from haori.jobs.queue.launching.local import LocalLauncher
from haori.jobs.queue.records import Job, Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.worker import Worker, start_worker_process
from haori.jobs.queue.workers import workers_seen
from tests.queue_tasks import KINDS

ROOT = Path(__file__).parents[2]
QUICK = Pace(lease_s=20, heartbeat_s=0.2, poll_s=0.02, grace_s=0.3)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    monkeypatch.setattr(kinds, "KINDS", KINDS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    database = open_database(f"sqlite:///{tmp_path / 'haori.db'}")
    yield JobStore(database, tmp_path / "jobs")
    database.close()


def work(store: JobStore, *, stop: Callable[[], bool] = lambda: False, pace: Pace = QUICK, name: str = "w") -> None:
    Worker(store, name, LocalLauncher(), Requirements(device="cpu"), pace).run(stop, until_empty=True)


def until(condition: Callable[[], object], seconds: float = 20.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)
    return found


def steps(job: Job) -> list[int]:
    """Return the steps that were done, over all attempts."""
    (file,) = job.folder.glob("attempt-*/work/steps.txt")
    return [int(line.split()[1]) for line in file.read_text().splitlines()]


def test_a_job_is_done_and_tells_how_far_it_is(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_OF_THE_WORKER", "hidden")
    given = store.submit("count", {"to": 5})
    work(store)
    job = store.find(given.id)
    assert (job.state, job.result, job.tokens) == (
        "succeeded", {"counted": 5, "tokens": 50, "path": None}, 50,
    )  # fmt: skip
    assert (job.progress["step"], job.progress["of"], job.progress["loss"]) == (5, 5, 0.2)
    said = store.events(job.id)
    assert next((event.type, event.message) for event in said if "Step 5" not in event.message) == ("message", "from 0")
    assert said[-2].data["values"] == {"loss": 0.5} and said[-2].type == "metrics"
    assert workers_seen(store.database) == ()  # it has ended


def test_what_it_prints_goes_to_a_file_and_never_blocks_it(store: JobStore):
    job = store.submit("chatter", {})
    work(store)
    assert store.find(job.id).state == "succeeded"
    assert (job.folder / "attempt-1" / "log.txt").stat().st_size > 3_000_000
    assert [event.message for event in store.events(job.id) if event.level == "warn"] == ["careful"]


def test_a_refusal_fails_with_its_sentence_and_an_unknown_kind_too(store: JobStore):
    refused, unknown = store.submit("refuse", {}), store.submit("fly", {})
    work(store)
    assert (store.find(refused.id).error.sentence, store.find(refused.id).error.kind) == (
        "row 3 is empty.", "DataError",
    )  # fmt: skip
    assert "There is no kind of job 'fly'; there are count" in store.find(unknown.id).error.sentence


def test_a_job_that_dies_twice_fails_with_the_last_lines_of_its_log(store: JobStore):
    job = store.submit("die", {})
    work(store)
    ended = store.find(job.id)
    assert (ended.state, ended.attempts) == ("failed", 2)
    assert "as the system does when memory runs out" in ended.error.sentence
    assert "about to die" in ended.error.sentence


def test_a_worker_that_is_told_to_end_saves_and_releases(store: JobStore):
    job = store.submit("count", {"to": 60})
    work(store, stop=lambda: (store.find(job.id).progress or {}).get("step", 0) >= 3)
    released = store.find(job.id)
    assert (released.state, released.attempts, released.worker) == ("queued", 0, None)
    work(store, name="other")
    done = store.find(job.id)
    assert (done.state, done.fence) == ("succeeded", 2)
    assert steps(done) == list(range(1, 61))  # none was done again


@pytest.mark.parametrize(("action", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_pausing_saves_and_cancelling_ends(store: JobStore, action: str, state: str):
    job = store.submit("count", {"to": 500})
    thread = threading.Thread(target=work, args=(store,))
    thread.start()
    until(lambda: store.find(job.id).progress)
    getattr(store, action)(job.id)
    thread.join(20)
    assert store.find(job.id).state == state
    if action == "pause":
        store.resume(job.id)
        with store.database.writing() as held:
            held.execute(update(jobs).values(spec={"to": 40}))
        work(store)
        assert steps(store.find(job.id)) == list(range(1, max(41, len(steps(job)) + 1)))


def test_a_process_that_does_not_listen_is_killed(store: JobStore):
    job = store.submit("deaf", {})
    thread = threading.Thread(target=work, args=(store,))
    thread.start()
    pid = int(until(lambda: next((path.read_text() for path in job.folder.glob("attempt-1/work/pid")), None)))
    store.cancel(job.id)
    thread.join(20)
    assert store.find(job.id).state == "cancelled"
    until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(store: JobStore, name: str, lease_s: float) -> "subprocess.Popen[bytes]":
    url = f"sqlite:///{store.database.url.database}"
    command = [sys.executable, "-m", "tests.queue_tasks", url, name, "0.05", str(lease_s)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HAORI_WORKSPACE": str(store.folder.parent)})


def pids(job: Job) -> set[int]:
    return {
        int(line.split()[0])
        for file in job.folder.glob("attempt-*/work/steps.txt")
        for line in file.read_text().splitlines()
    }


def test_of_two_workers_one_is_killed_and_the_other_goes_on(store: JobStore):
    job = store.submit("count", {"to": 60})
    first = start(store, "first", 1.5)
    until(lambda: (store.find(job.id).progress or {}).get("step", 0) > 5)
    child = next(iter(pids(job)))
    second = start(store, "second", 1.5)
    first.kill()
    first.wait()
    until(lambda: not alive(child), 2)  # its process does not train on
    done = until(lambda: (found := store.find(job.id)).state == "succeeded" and found)
    second.terminate()
    assert second.wait(20) == 0
    assert (done.fence, done.attempts) == (2, 2)
    assert sorted(set(steps(done))) == list(range(1, 61))
    assert len(steps(done)) <= 61  # at most the step it was killed in was done again
    assert any("gave no sign of life" in event.message for event in store.events(job.id))


def test_a_frozen_worker_loses_its_job_and_its_process_ends(store: JobStore):
    """A stopped machine or a stolen disk: the worker is there, but renews nothing."""
    job = store.submit("count", {"to": 60})
    first = start(store, "first", 1.5)
    until(lambda: (store.find(job.id).progress or {}).get("step", 0) > 2)
    child = next(iter(pids(job)))
    first.send_signal(signal.SIGSTOP)
    until(lambda: not alive(child), 3)
    second = Worker(store, "second", LocalLauncher(), Requirements(device="cpu"), QUICK)
    second.run(lambda: store.find(job.id).state == "succeeded")
    result = store.find(job.id)
    assert (result.fence, result.worker) == (2, None)
    first.send_signal(signal.SIGCONT)
    time.sleep(0.5)  # it looks around
    assert store.find(job.id) == result
    first.terminate()
    assert first.wait(20) == 0


def test_a_worker_whose_fence_is_old_kills_its_process_and_writes_nothing(store: JobStore):
    given = store.submit("count", {"to": 1000})
    job = store.claim("first", lease_s=60)
    thread = threading.Thread(target=Attempt(store, job, LocalLauncher(), QUICK).run, args=(lambda: False,))
    thread.start()
    until(lambda: store.find(given.id).progress)
    with store.database.writing() as held:  # as when the clock of leases jumped ahead
        held.execute(update(jobs).values(lease_until=0.0))
    fresh = store.claim("second")
    assert fresh.fence == 2
    thread.join(20)
    assert store.find(given.id).model_copy(update={"progress": None}) == fresh.model_copy(update={"progress": None})
    (child,) = pids(given)
    assert not alive(child)


def test_a_stale_process_cannot_write_where_the_new_attempt_works(tmp_path: Path):
    old = take_over(tmp_path, 1)
    (old / "checkpoint").write_text("3")
    new = take_over(tmp_path, 2)
    assert (new / "checkpoint").read_text() == "3"
    with pytest.raises(FileNotFoundError):
        (old / "checkpoint").write_text("stale")
    assert take_over(tmp_path, 1) == old and not list(old.iterdir())  # a stale worker takes nothing from a later one


def test_events_wait_while_the_disk_is_full_and_none_is_lost_or_torn(tmp_path: Path):
    file = tmp_path / "events.jsonl"
    writer, tail = EventWriter(file), EventTail(file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    texts = [f"event {n} " + "x" * 50 for n in range(20)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # as on a disk with 500 bytes left
        for text in texts[:10]:
            writer(Said(text=text))
        assert not writer.flush()
        early = tail.read()
        assert 0 < len(early) < 10
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for text in texts[10:]:
        writer(Said(text=text))
    assert [event.text for event in [*early, *tail.read()]] == texts
    EventWriter(Path("/dev/full"))(Said(text="lost, and the work goes on"))


def test_a_worker_beside_a_server_ends_with_it_and_however_the_server_ends(store: JobStore, tmp_path: Path):
    url, log = f"sqlite:///{store.database.url.database}", tmp_path / "worker.log"
    beside = start_worker_process(database=url, name="beside", log=log)
    until(lambda: [one.name for one in workers_seen(store.database)] == ["beside"])
    beside.stop()
    assert not beside.alive() and workers_seen(store.database) == ()
    assert "Worker beside takes jobs from" in log.read_text()

    code = (
        "import os, time; from haori.jobs.queue.worker import start_worker_process as start;"
        f"print(start(database={url!r}, name='orphan').pid, flush=True); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(server.stdout.readline())
    until(lambda: workers_seen(store.database))
    server.kill()
    server.communicate()
    until(lambda: not alive(pid))
    assert workers_seen(store.database) == ()  # it ended in order


def test_a_database_that_cannot_be_written_for_a_while_costs_nothing(store: JobStore, monkeypatch: pytest.MonkeyPatch):
    """As on a full disk: what was to be written is written later, in order, and the job's process goes on meanwhile."""
    real, refused = JobStore.add_events, []

    def full(self: JobStore, job: Job, new: object) -> bool:
        if len(refused) < 5:
            refused.append(job)
            raise StorageError("The database cannot be written: database or disk is full.")
        return real(self, job, new)

    monkeypatch.setattr(JobStore, "add_events", full)
    job = store.submit("count", {"to": 10})
    work(store)
    assert len(refused) == 5
    assert (store.find(job.id).state, store.find(job.id).attempts) == ("succeeded", 1)
    messages = [event.message for event in store.events(job.id)]
    assert messages[0] == "from 0" and messages[-2] == "Step 10: loss 0.5"
