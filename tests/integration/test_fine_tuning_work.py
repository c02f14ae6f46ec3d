"""The work of fine-tuning jobs in processes of their own: an adapter that lies, and an attempt that is killed."""

import json
import os
from pathlib import Path

import pytest

from haori.bases import find_base
from haori.jobs.database.connection import open_database
from haori.jobs.fine_tuning.recipe import Hyperparameters, Wanted
from haori.jobs.fine_tuning.service import Order
from haori.jobs.missing import MissingError
from haori.jobs.queue import kinds
from haori.jobs.queue.attempt import Pace
from haori.jobs.queue.estimate import estimate
from haori.jobs.queue.launching.local import LocalLauncher
from haori.jobs.queue.records import Requirements
from haori.jobs.queue.worker import Worker
from haori.library import Library
from haori.server.jobs_service import open_job_service
from tests.fine_tune_tasks import DAMAGED, DYING

ROOT = Path(__file__).parents[2]
ROWS = [{"messages": [{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": "yes"}]}
        for i in range(8)]  # fmt: skip


@pytest.fixture
def service(tiny_base_folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    opened = open_job_service(open_database(), find_base(str(tiny_base_folder)))
    yield opened
    opened.close()


def submitted(service):
    with service.files.incoming("train.jsonl", "fine-tune", 1 << 20) as arriving:
        arriving.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
        file = service.files.keep(arriving, "a")
    wanted = Wanted(name="", base="", hyperparameters=Hyperparameters(n_epochs=1), lora={"rank": 2})
    base = service.fine_tuning.served.name
    return service.fine_tuning.create(Order(wanted, base, file.id, suffix="s", request={"metadata": {}}), "a").id


def work(service):
    pace = Pace(lease_s=20, heartbeat_s=0.5, poll_s=0.02, grace_s=5)
    Worker(service.store, "w", LocalLauncher(), Requirements(device="cpu"), pace).run(lambda: False, until_empty=True)


def test_a_job_whose_adapter_fails_its_proof_is_failed_with_the_sentence_and_no_name(service, monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", DAMAGED)
    made = submitted(service)
    work(service)
    job = service.store.find(made)
    assert (job.state, job.attempts, job.result, job.error.kind) == ("failed", 1, None, "VerificationError")
    assert "failed" in job.error.sentence and job.error.sentence.endswith((".", ")"))
    assert service.names.list("a") == []
    [claim] = service.names.all()  # of the job, from when it was submitted
    with pytest.raises(MissingError):
        service.names.find(claim.name, "a")
    assert list(Library().list()) == []


def test_an_attempt_killed_before_its_result_is_told_goes_on_and_ends_once(service, monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", DYING)
    made = submitted(service)
    [claim] = service.names.all()
    work(service)
    job = service.store.find(made)
    assert (job.state, job.attempts) == ("succeeded", 2), job.error
    names = service.names.list("a")
    assert {name.name for name in names} == {claim.name, *(point["name"] for point in job.result["checkpoints"])}
    assert len(names) == 1 + len(job.result["checkpoints"])
    assert job.result["model"] == claim.name
    stored = [adapter.name for adapter in Library().list()]
    assert sorted(stored) == sorted({name.library_name for name in names})  # none stored twice
    [results] = service.files.list("a", purpose="fine-tune-results")[0]
    assert results.id == job.result["result_file"]
    assert [event.message for event in service.store.events(made)].count("The job succeeded.") == 1
    # The next estimate learns from it, as from any training.
    learnt = estimate(service.store, base=job.spec["recipe"]["base"], tokens=1000)
    assert learnt.from_jobs == 1
    record = job.result["record"]
    assert learnt.seconds == pytest.approx(1000 * record["seconds"] / record["tokens"], abs=0.1)
