"""The queue in its database: what is submitted, claimed, written with a fence, and asked of jobs; on both databases."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from haori.core.errors import InputError
from haori.jobs.database.connection import Database, open_database
from haori.jobs.database.tables import jobs
from haori.jobs.queue.records import Flags, JobNotFoundError, Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.workers import forget_worker, note_worker, obstacle, workers_seen
from haori.jobs.quotas import QuotaError, Quotas

CPU = Requirements(device="cpu", memory_bytes=8 * 10**9)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'haori.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres")
    opened = open_database(url)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database, tmp_path: Path) -> JobStore:
    return JobStore(database, tmp_path / "jobs")


def claim(store: JobStore, worker: str = "w", offers: Requirements = CPU, lease_s: float = 60.0):
    return store.claim(worker, offers=offers, lease_s=lease_s)


def lose(store: JobStore, job_id: str) -> None:
    """Let the lease of a job run out, as if its worker had been silent for a minute."""
    with store.database.writing() as held:
        held.execute(update(jobs).where(jobs.c.id == job_id).values(lease_until=jobs.c.lease_until - 61))


def test_a_job_goes_from_submitting_to_its_result(store: JobStore):
    given = store.submit("train", {"recipe": {"n": [1]}}, owner="a", rows=5, tokens=100, job_id="ftjob-1")
    assert (given.state, given.attempts, given.spec, given.folder) == (
        "queued", 0, {"recipe": {"n": [1]}}, store.folder / "ftjob-1",
    )  # fmt: skip
    job = claim(store)
    assert (job.id, job.state, job.worker, job.fence, job.attempts) == ("ftjob-1", "running", "w", 1, 1)
    assert claim(store) is None
    assert store.heartbeat(job) == Flags(cancel=False, pause=False)
    assert store.set_progress(job, {"step": 3, "of": 9})
    assert store.add_event(job, "info", "metrics", "step 3", {"train_loss": 1.5})
    assert store.finish(job, {"adapter": "x@1"}, tokens=90)
    ended = store.find("ftjob-1", "a")
    assert (ended.state, ended.result, ended.tokens, ended.progress) == (
        "succeeded", {"adapter": "x@1"}, 90, {"step": 3, "of": 9},
    )  # fmt: skip
    assert ended.started <= ended.ended
    assert [(event.n, event.type, event.data) for event in store.events("ftjob-1")] == [
        (1, "metrics", {"train_loss": 1.5}), (2, "message", None),
    ]  # fmt: skip
    with pytest.raises(JobNotFoundError, match="There is no job 'ftjob-1'"):
        store.find("ftjob-1", "b")


def test_workers_that_claim_at_once_never_take_the_same(store: JobStore):
    for n in range(40):
        store.submit("train", {}, owner=f"owner-{n % 3}")
    taken: list[str] = []

    def work(name: str) -> None:
        while (job := claim(store, name)) is not None:
            taken.append(job.id)
            assert store.finish(job, {})

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 40 == len(set(taken))


def test_priority_comes_before_age_and_one_owner_cannot_hold_the_others_up(store: JobStore):
    for _ in range(6):
        store.submit("train", {}, owner="hog")
    for owner in ("b", "c"):
        store.submit("train", {}, owner=owner)
    store.submit("train", {}, owner="hog", priority=1)
    order = []
    for _ in range(5):
        order.append(claim(store))
    assert [(job.owner, job.priority) for job in order] == [("hog", 1), ("b", 0), ("c", 0), ("hog", 0), ("hog", 0)]
    store.submit("train", {}, owner="b")
    assert claim(store).owner == "b"  # has one running; the hog has three


def test_owners_with_nothing_running_take_turns(store: JobStore):
    for owner in ("a", "a", "a", "b", "b"):
        store.submit("train", {}, owner=owner)
    order = []
    for _ in range(5):
        job = claim(store)
        order.append(job.owner)
        store.finish(job, {})
        time.sleep(0.002)
    assert order == ["a", "b", "a", "b", "a"]


def test_a_worker_gets_only_what_it_can_do(store: JobStore):
    store.submit("train", {}, job_id="gpu", requirements=Requirements(device="cuda"))
    store.submit("train", {}, job_id="large", requirements=Requirements(memory_bytes=9 * 10**9))
    store.submit("train", {}, job_id="fits", requirements=Requirements(device="cpu", memory_bytes=8 * 10**9))
    assert claim(store).id == "fits"
    assert claim(store) is None
    assert claim(store, offers=Requirements(device="cuda", memory_bytes=8 * 10**9)).id == "gpu"
    assert claim(store, offers=Requirements(device="cpu")).id == "large"  # its memory is not known


def test_a_job_waits_for_its_time(store: JobStore):
    store.submit("train", {}, not_before=time.time() + 60)
    assert claim(store) is None


def test_a_stale_worker_changes_nothing_and_is_told(store: JobStore):
    store.submit("train", {}, job_id="j")
    stale = claim(store, "first")
    lose(store, "j")
    fresh = claim(store, "second")
    assert (fresh.id, fresh.fence, fresh.attempts) == ("j", 2, 2)
    assert store.heartbeat(stale) is None
    writes = (
        store.set_progress(stale, {"step": 99}), store.add_event(stale, "info", "message", "stale"),
        store.finish(stale, {"from": "stale"}), store.fail(stale, "stale"), store.died(stale, "stale"),
        store.release(stale),
    )  # fmt: skip
    assert not any(writes)
    assert store.find("j") == fresh
    assert not any("stale" in event.message for event in store.events("j"))
    assert store.finish(fresh, {"from": "fresh"})
    assert not store.finish(fresh, {"from": "again"})
    assert store.find("j").result == {"from": "fresh"}


def test_three_attempts_and_the_second_death_at_the_same_step_ends_it(store: JobStore):
    store.submit("train", {}, job_id="moves")
    for step in (1, 2, 3):
        job = claim(store)
        store.set_progress(job, {"step": step})
        lose(store, "moves")
    assert claim(store) is None
    ended = store.find("moves")
    assert (ended.state, ended.error.kind) == ("failed", "JobDied")
    assert "given up at step 3 after 3 attempts" in ended.error.sentence

    store.submit("train", {}, job_id="stuck")
    for _ in range(2):
        job = claim(store)
        store.set_progress(job, {"step": 7})
        (job.folder / f"attempt-{job.fence}").mkdir(parents=True)
        (job.folder / f"attempt-{job.fence}" / "log.txt").write_text("first\nout of memory at layer 3\n")
        store.died(job, "The process was killed.")
    ended = store.find("stuck")
    assert ended.state == "failed"
    assert "it died there 2 times" in ended.error.sentence and "out of memory at layer 3" in ended.error.sentence

    assert store.retry("stuck").state == "queued"
    store.died(claim(store), "The process was killed.")
    assert store.find("stuck").state == "queued"  # what came before the new try does not count


def test_a_released_attempt_does_not_count(store: JobStore):
    store.submit("train", {}, job_id="j")
    for _ in range(5):
        assert store.release(claim(store))
    assert (store.find("j").attempts, store.find("j").fence) == (0, 5)
    assert store.release(claim(store), delay_s=60, count_attempt=True)
    assert store.find("j").attempts == 1
    assert claim(store) is None


def test_the_same_key_gives_the_same_job(store: JobStore):
    first = store.submit("train", {"a": 1}, owner="a", idempotency_key="k")
    made: list[str] = []

    def again() -> None:
        made.append(store.submit("train", {"a": 1}, owner="a", idempotency_key="k").id)

    threads = [threading.Thread(target=again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [first.id] * 4
    assert store.submit("train", {"a": 1}, owner="b", idempotency_key="k").id != first.id
    with pytest.raises(InputError, match="was used for another job"):
        store.submit("train", {"a": 2}, owner="a", idempotency_key="k")


@pytest.mark.parametrize(
    ("before", "actions", "state"),
    [
        ("queued", ["cancel"], "cancelled"),
        ("queued", ["pause"], "paused"),
        ("queued", ["pause", "resume"], "queued"),
        ("queued", ["pause", "cancel", "retry"], "queued"),
    ],
)
def test_what_is_asked_of_a_waiting_job_happens_at_once(store: JobStore, before, actions, state):
    store.submit("train", {}, job_id="j")
    for action in actions:
        getattr(store, action)("j")
    assert store.find("j").state == state
    assert (claim(store) is None) == (state != "queued")


def test_a_running_job_is_asked_and_its_worker_ends_it(store: JobStore):
    for action, state in (("cancel", "cancelled"), ("pause", "paused")):
        store.submit("train", {}, job_id=action)
        job = claim(store)
        assert getattr(store, action)(action).state == "running"
        assert getattr(store.heartbeat(job), action)
        store.release(job)
        assert store.find(action).state == state
    with pytest.raises(InputError, match="is cancelled, so it cannot be made to pause; queued or running or paused"):
        store.pause("cancel")
    with pytest.raises(JobNotFoundError):
        store.cancel("pause", owner="stranger")


def test_a_paused_job_whose_worker_died_stays_paused(store: JobStore):
    store.submit("train", {}, job_id="j")
    claim(store)
    store.pause("j")
    lose(store, "j")
    assert claim(store) is None
    assert store.find("j").state == "paused"


def test_pages_are_newest_first(store: JobStore):
    for n in range(5):
        store.submit("train" if n else "merge", {}, job_id=f"j{n}", owner="a" if n != 2 else "b")
        time.sleep(0.002)
    page, more = store.list(limit=2)
    assert ([job.id for job in page], more) == (["j4", "j3"], True)
    page, more = store.list(after="j3", limit=9)
    assert ([job.id for job in page], more) == (["j2", "j1", "j0"], False)
    assert [job.id for job in store.list("b")[0]] == ["j2"]
    assert [job.id for job in store.list(kinds=["merge"], states=["queued"])[0]] == ["j0"]


def test_events_of_all_jobs_are_one_stream_that_an_owner_sees_his_part_of(store: JobStore):
    for owner in ("a", "b"):
        store.submit("train", {}, job_id=owner, owner=owner)
    for job_id, text in (("a", "one"), ("b", "two"), ("a", "three")):
        store.add_event(job_id, "info", "message", text)
    everything = store.events_after(0)
    assert [event.message for event in everything] == ["one", "two", "three"]
    assert [event.n for event in everything] == [1, 1, 2]
    assert [event.message for event in store.events_after(everything[0].number, "a")] == ["three"]
    assert [event.message for event in store.events("a", after_n=1)] == ["three"]


def test_admission_is_asked_in_the_same_transaction(store: JobStore):
    quotas = Quotas(jobs=1)
    for _ in range(2):  # the second is the same job, and takes no more
        store.submit(
            "train", {}, owner="a", idempotency_key="k", admit=lambda c: quotas.check_job(c, "a", rows=0, tokens=0)
        )
    with pytest.raises(QuotaError, match="has 1 unfinished jobs"):
        store.submit("train", {}, owner="a", admit=lambda c: quotas.check_job(c, "a", rows=0, tokens=0))
    assert len(store.list()[0]) == 1


def test_pruning_deletes_what_ended_long_ago(store: JobStore):
    for name in ("old", "new"):
        store.submit("train", {}, job_id=name)
        job = claim(store)
        job.folder.mkdir(parents=True)
        store.finish(job, {})
    with store.database.writing() as held:
        held.execute(update(jobs).where(jobs.c.id == "old").values(ended=time.time() - 100))
    store.submit("train", {}, job_id="waits")
    assert store.prune(older_than_s=50) == ("old",)
    assert not (store.folder / "old").exists() and (store.folder / "new").exists()
    assert {job.id for job in store.list()[0]} == {"new", "waits"}
    assert store.events("old") == ()


def test_a_jump_of_the_wall_clock_does_not_end_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    database = open_database(f"sqlite:///{tmp_path / 'haori.db'}")
    store = JobStore(database, tmp_path)
    store.submit("train", {}, job_id="j")
    job = claim(store)
    real = time.time
    for jump in (86400.0, -86400.0):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        assert claim(store, "other") is None
        assert store.heartbeat(job) is not None
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)  # the machine was started again: no worker can be left
    if job.fence:  # a lease from before ends too far ahead, unless the machine had only just been started
        with store.database.writing() as held:
            held.execute(update(jobs).values(lease_until=90_000.0))
    assert claim(store, "other").fence == 2
    database.close()


def test_processes_claim_together(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'haori.db'}"
    database = open_database(url)
    store = JobStore(database, tmp_path)
    for _ in range(30):
        store.submit("train", {})
    code = f"""
from haori.jobs.database.connection import open_database
from haori.jobs.queue.store import JobStore
store = JobStore(open_database({url!r}))
while (job := store.claim("w")) is not None:
    print(job.id)
    assert store.finish(job, {{}})
"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    taken = [line for process in running for line in process.communicate(timeout=60)[0].split()]
    assert len(taken) == 30 == len(set(taken))
    database.close()


def test_a_job_that_no_worker_could_do_says_so(store: JobStore):
    database = store.database
    job = store.submit("train", {}, requirements=Requirements(device="cuda", memory_bytes=20 * 10**9))
    assert obstacle(database, job) == "No worker is there; start one with `haori worker`."
    note_worker(database, "small", CPU, 60)
    note_worker(database, "small", CPU, 60)
    assert obstacle(database, job) == ("It needs cuda with 20.0 GB, and no worker has that: small (cpu with 8.0 GB).")
    note_worker(database, "large", Requirements(device="cuda", memory_bytes=20 * 10**9), 60)
    assert obstacle(database, job) is None
    forget_worker(database, "large")
    note_worker(database, "gone", Requirements(device="cuda"), -1)
    assert obstacle(database, job) is not None
    assert [one.name for one in workers_seen(database)] == ["small"]
