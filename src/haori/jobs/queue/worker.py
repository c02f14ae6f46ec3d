"""The worker: claims one job after another and sees each through, until it is told to end.

What it is killed in the middle of loses nothing: its process ends with it, its lease runs out, and another worker goes
on from the last checkpoint.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from haori.core.errors import StorageError
from haori.jobs.database.connection import Database, in_full
from haori.jobs.queue.attempt import Attempt, Pace
from haori.jobs.queue.launching import Launcher, launcher_named
from haori.jobs.queue.records import Job, Requirements
from haori.jobs.queue.store import JobStore
from haori.jobs.queue.workers import forget_worker, note_worker

__all__ = ["Worker", "WorkerProcess", "own_offers", "start_worker", "start_worker_process", "worker_name"]

_SEEN_S = 90.0
_IDLE_S = 1.0


class Worker:
    """Takes jobs from a queue and sees them through.

    Args:
        store: The queue.
        name: Its name, of which there is one.
        launcher: Where processes run.
        offers: What jobs may need.
        pace: How often what is done.
        on_job: Told of each job as it is claimed, and again as it is left.
    """

    def __init__(
        self,
        store: JobStore,
        name: str,
        launcher: Launcher,
        offers: Requirements,
        pace: Pace | None = None,
        on_job: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._store, self._name, self._launcher, self._offers = store, name, launcher, offers
        self._pace, self._on_job = pace or Pace(), on_job
        self._noted = -_SEEN_S

    def run(self, stop: Callable[[], bool], *, until_empty: bool = False) -> None:
        """Work until `stop` says so, or until nothing is left that it could take.

        Raises:
            StorageError: The database could not be reached from the beginning.
        """
        self._note()
        while not stop():
            try:
                self._note()
                job = self._store.claim(self._name, lease_s=self._pace.lease_s, offers=self._offers)
            except StorageError as error:
                print(f"Warning: {in_full(error)} It is tried again.", file=sys.stderr)
                time.sleep(_IDLE_S)
                continue
            if job is None:
                if until_empty:
                    break
                time.sleep(min(_IDLE_S, self._pace.poll_s))
                continue
            self._on_job(job)
            url = self._store.database.url.render_as_string(hide_password=False)
            Attempt(self._store, job, self._launcher, self._pace, url).run(self._watched(stop))
            with suppress(StorageError):  # the attempt has waited for the database as long as its lease held
                self._on_job(self._store.find(job.id))
        with suppress(StorageError):
            forget_worker(self._store.database, self._name)

    def _watched(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return `stop`, which also says in passing that this worker is there."""

        def asked() -> bool:
            with suppress(StorageError):  # the attempt minds its lease itself
                self._note()
            return stop()

        return asked

    def _note(self) -> None:
        if time.monotonic() - self._noted > _SEEN_S / 3:
            note_worker(self._store.database, self._name, self._offers, _SEEN_S)
            self._noted = time.monotonic()


def start_worker(
    database: Database,
    *,
    name: str | None = None,
    launcher: str = "local",
    stop: Callable[[], bool] = lambda: False,
    pace: Pace | None = None,
    until_empty: bool = False,
    on_job: Callable[[Job], None] = lambda job: None,
) -> None:
    """Work in this process until `stop` says so.

    Args:
        database: The open database.
        name: Name of the worker; by default of this machine and process.
        launcher: `local`, `ray` or `slurm`.
        stop: Asked often.
        pace: How often what is done.
        until_empty: End once there is nothing left that it could take.
        on_job: Told of each job as it is claimed, and again as it is left.

    Raises:
        HaoriError: There is no such launcher, or the database cannot be reached.
    """
    worker = Worker(JobStore(database), name or worker_name(), launcher_named(launcher), own_offers(), pace, on_job)
    worker.run(stop, until_empty=until_empty)


def worker_name() -> str:
    """Return a name that no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


def own_offers() -> Requirements:
    """Return the device and memory of this machine, as it is now."""
    from haori.bases import default_device

    device = default_device()
    if device == "cuda":
        import torch

        return Requirements(device=device, memory_bytes=torch.cuda.get_device_properties(0).total_memory)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return Requirements(device=device)
    return Requirements(device=device, memory_bytes=memory)


class WorkerProcess:
    """A worker in a process of its own, as `haori serve --jobs` has one.

    Args:
        process: The process, whose standard input only this one holds open.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Return its number."""
        return self._process.pid

    def alive(self) -> bool:
        """Say whether it runs."""
        return self._process.poll() is None

    def stop(self, grace_s: float = 70.0) -> None:
        """Let it save and release its job, and wait; kill it once the grace is over."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def start_worker_process(
    *, database: str | None = None, name: str | None = None, log: Path | None = None
) -> WorkerProcess:
    """Start `haori worker` beside this process; it ends when this process does, however that happens.

    Args:
        database: Address of the database; by default the one of the settings.
        name: Name of the worker.
        log: File for what it prints; by default it prints where this process does.
    """
    command = [sys.executable, "-m", "haori.cli.app", "worker", "--with-parent"]
    command += [] if name is None else ["--name", name]
    environment = os.environ if database is None else {**os.environ, "HAORI_DATABASE": database}
    out = None if log is None else log.open("ab")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    finally:
        if out is not None:
            out.close()
    return WorkerProcess(process)
