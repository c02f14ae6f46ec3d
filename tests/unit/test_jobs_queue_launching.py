"""Jobs through schedulers: the executor of submitit, where it is installed, and a double of Ray that runs them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import update

from haori.core.errors import HaoriError, InputError, MissingExtraError
from haori.core.settings import settings
from haori.jobs.database.connection import open_database
from haori.jobs.database.tables import jobs
from haori.jobs.queue import kinds
from haori.jobs.queue.attempt import Pace
from haori.jobs.queue.launching import Launcher, launcher_named
from haori.jobs.queue.launching.ray_jobs import RayLauncher
from haori.jobs.queue.records import Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.worker import Worker
from tests.queue_tasks import KINDS

ROOT = Path(__file__).parents[2]
PACE = Pace(lease_s=5, heartbeat_s=0.5, poll_s=0.05, grace_s=5)


class RayDouble:
    """Ray 2.60's JobSubmissionClient as the launcher uses it; entry points run in a shell, as Ray runs them."""

    def __init__(self):
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.asked: list[dict] = []

    def submit_job(self, *, entrypoint: str, runtime_env: dict, **reserved) -> str:
        self.asked.append(reserved)
        assert all(isinstance(value, str) for value in runtime_env["env_vars"].values())
        environment = {**os.environ, **runtime_env["env_vars"]}
        name = f"raysubmit_{len(self.running)}"
        self.running[name] = subprocess.Popen(entrypoint, shell=True, env=environment, cwd="/")
        return name

    def get_job_status(self, job_id: str) -> SimpleNamespace:
        if job_id not in self.running:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist")
        code = self.running[job_id].poll()
        return SimpleNamespace(value="RUNNING" if code is None else "SUCCEEDED" if code == 0 else "FAILED")

    def stop_job(self, job_id: str) -> bool:
        self.running[job_id].terminate()
        return True

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.get_job_status(job_id).value, message="Job entrypoint command failed.\nmore")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kinds, "KINDS", KINDS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    database = open_database(f"sqlite:///{tmp_path / 'haori.db'}")
    yield JobStore(database, tmp_path / "jobs")
    database.close()


@pytest.fixture(params=["ray", "slurm"])
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "ray":
        monkeypatch.setenv("HAORI_RAY_JOB", '{"entrypoint_num_cpus": 1}')
        settings.cache_clear()
        yield RayLauncher(RayDouble())
        return
    pytest.importorskip("submitit")
    monkeypatch.setenv("HAORI_SLURM", '{"cluster": "local", "timeout_min": 5}')
    settings.cache_clear()
    yield launcher_named("slurm")


def work(store: JobStore, launcher: Launcher, stop=lambda: False) -> None:
    Worker(store, "w", launcher, Requirements(device="cpu"), PACE).run(stop, until_empty=True)


def test_a_job_is_done_stopped_gone_on_with_and_seen_to_die(store: JobStore, launcher: Launcher):
    done = store.submit("count", {"to": 3})
    work(store, launcher)
    assert store.find(done.id).result["counted"] == 3
    if launcher.name == "ray":
        assert launcher._client.asked[0] == {"entrypoint_num_cpus": 1}

    stopped = store.submit("count", {"to": 80})
    work(store, launcher, lambda: (store.find(stopped.id).progress or {}).get("step", 0) >= 3)
    assert (store.find(stopped.id).state, store.find(stopped.id).attempts) == ("queued", 0)
    work(store, launcher)
    found = store.find(stopped.id)
    assert found.state == "succeeded"
    (file,) = found.folder.glob("attempt-2/work/steps.txt")
    assert [int(line.split()[1]) for line in file.read_text().splitlines()] == list(range(1, 81))

    died = store.submit("die", {})
    work(store, launcher)
    assert store.find(died.id).state == "failed"
    assert "about to die" in store.find(died.id).error.sentence


def test_a_process_whose_worker_is_gone_ends_before_its_lease(tmp_path: Path, store: JobStore):
    """Of a scheduler's process nobody holds a pipe; it looks at what the worker touches."""
    from haori.jobs.queue.attempt import Attempt

    store.submit("deaf", {})
    client = RayDouble()
    attempt = Attempt(store, store.claim("w", lease_s=2), RayLauncher(client), PACE._replace(lease_s=2))
    attempt._start()  # and the worker is killed here
    started = time.monotonic()
    assert client.running["raysubmit_0"].wait(10) == -9
    assert time.monotonic() - started < 5


def test_what_is_lacking_or_unknown_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="There is no launcher 'kubernetes'; there are local, ray and slurm"):
        launcher_named("kubernetes")
    monkeypatch.setenv("HAORI_RAY_JOB", '{"gpus": 1}')
    settings.cache_clear()
    with pytest.raises(InputError, match="HAORI_RAY_JOB cannot hold 'gpus'"):
        RayLauncher(RayDouble())
    monkeypatch.delenv("HAORI_RAY_JOB")
    settings.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'haori\[slurm\]'"):
        launcher_named("slurm")


def test_settings_that_submitit_does_not_know_fail_the_job_with_a_sentence(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("submitit")
    monkeypatch.setenv("HAORI_SLURM", '{"cluster": "local", "colour": "red"}')
    settings.cache_clear()
    job = store.submit("count", {"to": 3})
    work(store, launcher_named("slurm"))
    assert store.find(job.id).state == "failed"
    assert store.find(job.id).error.sentence.startswith("HAORI_SLURM cannot be used:")


class Refuses(RayDouble):
    def submit_job(self, **given):
        raise RuntimeError("Request failed with status code 500:\nTraceback")


def test_errors_of_launchers_are_sentences(tmp_path: Path):
    with pytest.raises(HaoriError, match=r"Ray did not take the job: Request failed with status code 500:\.$"):
        RayLauncher(Refuses()).start(["true"], tmp_path, {"HAORI_DATABASE": "secret"})
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_takes_no_job_is_asked_again_and_not_for_ever(store: JobStore):
    job = store.submit("count", {"to": 3}, max_attempts=2)
    work(store, RayLauncher(Refuses()))
    assert (store.find(job.id).state, store.find(job.id).attempts) == ("queued", 1)
    with store.database.writing() as held:  # half a minute later
        held.execute(update(jobs).values(not_before=0.0))
    work(store, RayLauncher(Refuses()))
    found = store.find(job.id)
    assert (found.state, found.error.kind) == ("failed", "UnavailableError")
    assert found.error.sentence.startswith("Ray did not take the job")


def test_rays_job_has_its_environment_by_a_file_that_is_gone_once_it_runs(tmp_path: Path):
    client, asked = RayDouble(), {"HAORI_DATABASE": "postgresql://a:it's $ecret@b/c", "HAORI_A": "two\nlines"}
    launcher = RayLauncher(client)
    code = "import os; print([os.environ[name] for name in ('HAORI_DATABASE', 'HAORI_A')])"
    handle = launcher.start([sys.executable, "-c", code], tmp_path, asked)
    client.running[handle].wait(20)
    assert (tmp_path / "log.txt").read_text().strip() == str(list(asked.values()))
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert "ecret" not in client.running[handle].args
