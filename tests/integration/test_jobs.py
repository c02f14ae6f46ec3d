"""The queue with real work: trainings submitted on the command line, done by workers, killed, gone on with, listed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import update

from haori.jobs.database.connection import open_database
from haori.jobs.database.tables import jobs
from haori.jobs.queue.records import Requirements
from haori.jobs.queue.store import JobStore
from haori.library import Library
from tests.command_line import haori as haori_command


@pytest.fixture
def store(haori_home: Path):
    database = open_database()
    yield JobStore(database)
    database.close()


@pytest.fixture
def recipe(tiny_base_folder: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"what is number {i}?", "completion": f"it is {'odd' if i % 2 else 'even'}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "name": "numbers", "base": str(tiny_base_folder), "data": {"path": "rows.jsonl"},
        "method": {"kind": "lora", "rank": 4}, "training": {"dtype": "fp32", "epochs": 2},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


def worker(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "haori.cli.app", "worker", *words]
    return subprocess.Popen(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_training_is_queued_with_an_estimate_and_done_by_a_worker(
    capsys, haori_home, recipe, store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAORI_PRICES", '{"*tiny-base*": 1000}')
    from haori.core.settings import settings

    settings.cache_clear()
    queued = haori_command(capsys, "train", recipe, "--queue")
    assert queued.code == 0, queued.err
    assert "No job on this base has finished here yet; measured on the largest batch." in queued.out
    assert re.search(r"price +│ +[\d.]+ USD", queued.out), queued.out
    assert "No worker is there; start one with `haori worker`." in queued.out
    job_id = re.search(r"Queued as (job-\w+)", queued.out)[1]
    other = store.submit("export", {"name": "numbers", "format": "peft"}, priority=-1)
    measure = store.submit("evaluate", {"name": "numbers", "data": str(tmp_path / "rows.jsonl")}, priority=-2)
    merged = store.submit("merge", {"name": "numbers"}, priority=-2)

    os.chdir("/")  # what the recipe calls rows.jsonl is found all the same
    process = worker("--until-empty", "--name", "one")
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, said
    assert f"{job_id} (train, local): succeeded" in said
    job = store.find(job_id)
    assert job.state == "succeeded", job.error
    assert (job.result["adapter"], job.tokens) == ("numbers@1", job.result["record"]["tokens"])
    assert Library().get("numbers").card.verification.passed
    assert job.progress["step"] == job.result["record"]["steps"] == job.progress["of"]
    messages = [event.message for event in store.events(job_id)]
    assert messages[0] == "The run began." and messages[-1] == "The job succeeded."
    assert any(message.startswith("Saved the checkpoint") for message in messages)
    exported = store.find(other.id)
    assert exported.state == "succeeded", exported.error
    assert (Path(exported.result["path"]) / "adapter_model.safetensors").read_bytes() == (
        Path(job.result["run"]) / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    measured = store.find(measure.id)
    assert measured.state == "succeeded", measured.error
    assert any(metric["difference"] is not None for metric in measured.result["metrics"].values())
    assert store.find(merged.id).state == "succeeded"
    assert (Path(store.find(merged.id).result["folder"]) / "config.json").is_file()

    again = haori_command(capsys, "train", recipe, "--queue", "--set", f"data.path={tmp_path / 'rows.jsonl'}")
    assert "Learnt from 1 finished job on this base and machine." in again.out
    assert "succeeded" in haori_command(capsys, "jobs", "list").out
    shown = haori_command(capsys, "jobs", "show", job_id).out
    assert "numbers@1" in shown and "The job succeeded." in shown
    assert "The run began." in haori_command(capsys, "jobs", "logs", job_id).out
    waiting = re.search(r"Queued as (job-\w+)", again.out)[1]
    for action, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        assert f"is {state}" in haori_command(capsys, "jobs", action, waiting).out
    refused = haori_command(capsys, "jobs", "retry", waiting)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    with store.database.writing() as held:
        held.execute(update(jobs).where(jobs.c.state == "succeeded").values(ended=time.time() - 3600))
    assert haori_command(capsys, "jobs", "prune", "--older-than", "30m").out == (
        "Deleted 4 jobs that ended more than 30m ago.\n"
    )
    assert not job.folder.exists() and Library().get("numbers")


def weights(name: str) -> bytes:
    return (Library().get(name).path / "adapter_model.safetensors").read_bytes()


@pytest.mark.timeout(280)
def test_jobs_and_workers_that_are_killed_lose_nothing_and_end_as_undisturbed_ones(recipe, store, tmp_path):
    """Two workers, two jobs, kills of workers and of their processes at random instants."""
    document = json.loads(recipe.read_text())
    document["data"]["path"] = str(tmp_path / "rows.jsonl")
    document["training"] |= {"epochs": 2, "evaluations_per_epoch": 4}
    undisturbed = store.submit("train", {"recipe": {**document, "name": "calm"}})
    process = worker("--until-empty")
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert store.find(undisturbed.id).state == "succeeded"

    storm = [store.submit("train", {"recipe": {**document, "name": f"storm-{n}"}}, max_attempts=1000) for n in range(2)]
    pace = ("--lease", "2", "--heartbeat", "0.3")
    workers = [worker(*pace) for _ in range(2)]
    drawn, kills = random.Random(7), 0
    ends = time.monotonic() + 240
    while any(store.find(job.id).state != "succeeded" for job in storm):
        assert time.monotonic() < ends, [store.find(job.id) for job in storm]
        time.sleep(0.1)
        busy = [(number, found) for number, process in enumerate(workers) if (found := children(process.pid))]
        if kills < 4 and busy:
            number, processes = drawn.choice(busy)
            time.sleep(drawn.uniform(0, 4))
            if kills % 2:
                end(processes[0])
            else:
                workers[number].kill()
                workers[number].communicate()
                workers[number] = worker(*pace)
            kills += 1
    for process in workers:
        process.terminate()
        assert process.wait(60) == 0
        process.communicate()
    assert sum(store.find(job.id).attempts for job in storm) > 2, kills
    expected = weights("calm")
    names = sorted(stored.name for stored in Library().list())
    assert names == ["calm@1", "storm-0@1", "storm-1@1"]  # none stored twice
    assert all(weights(f"storm-{n}") == expected for n in range(2))
    assert store.claim("nobody", offers=Requirements(device="cpu")) is None


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the processes that a process started, if it lives."""
    try:
        tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in tasks.split()]


def test_a_job_is_done_by_a_worker_that_reaches_postgresql(postgres, haori_home, recipe, monkeypatch):
    monkeypatch.setenv("HAORI_DATABASE", postgres)
    from haori.core.settings import settings

    settings.cache_clear()
    database = open_database()
    store = JobStore(database)
    document = json.loads(recipe.read_text())
    document["data"]["path"] = str(recipe.with_name("rows.jsonl"))
    job = store.submit("train", {"recipe": document})
    process = worker("--until-empty", "--name", "far")
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0, said
    found = store.find(job.id)
    assert (found.state, found.fence, found.result["adapter"]) == ("succeeded", 1, "numbers@1"), found.error
    assert "The job succeeded." in [event.message for event in store.events(job.id)]
    assert not settings().database_file.exists(), "nothing is kept elsewhere"
    database.close()
