"""One attempt at a job: its process started, watched, and what came of it written with the fence of the claim.

The lease is renewed here, and `beat` touched only then: a worker that cannot reach the database, is frozen or gone
stops both, and its process ends before another attempt can begin.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from haori.core.errors import HaoriError, StorageError, UnavailableError
from haori.core.storage import write_text
from haori.jobs.database.connection import DatabaseError
from haori.jobs.process import JobResult, JobSpec
from haori.jobs.queue.event_file import EventTail
from haori.jobs.queue.folders import EVENTS, JOB, PROCESS, RESULT, attempt_folder, attempts_of, take_over, touch
from haori.jobs.queue.kinds import task_of_kind
from haori.jobs.queue.launching import Launcher
from haori.jobs.queue.records import Flags, Job
from haori.jobs.queue.reporting import Report
from haori.jobs.queue.store import JobStore

__all__ = ["Attempt", "Pace"]

_T = TypeVar("_T")
_LATER_S = 30.0
# What the process is given of the environment: where things are, how to compute; no secret of the worker's.
_PASSED = ("PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH", "CC", "MPLBACKEND",
           "TOKENIZERS_PARALLELISM", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "VIRTUAL_ENV")  # fmt: skip
_PREFIXES = ("HAORI_", "LC_", "OMP_", "MKL_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "TORCH_", "PYTORCH_", "PYTHON",
             "XDG_", "SSL_", "REQUESTS_CA_")  # fmt: skip


class Pace(NamedTuple):
    """How often a worker does what, in seconds.

    Attributes:
        lease_s: How long a claim holds without a renewal.
        heartbeat_s: How often it is renewed.
        poll_s: How often a process, its events and what is asked of its job are looked at.
        grace_s: How long a process may take to save before it is killed.
    """

    lease_s: float = 60.0
    heartbeat_s: float = 10.0
    poll_s: float = 0.5
    grace_s: float = 60.0


class Attempt:
    """One claim of a job, from its process to its end.

    Args:
        store: The queue.
        job: As it was claimed.
        launcher: Starts the process.
        pace: How often what is done.
        database_url: Where the database is, for work that needs it; None as in the environment.
    """

    def __init__(
        self, store: JobStore, job: Job, launcher: Launcher, pace: Pace, database_url: str | None = None
    ) -> None:
        self._store, self._job, self._launcher, self._pace, self._url = store, job, launcher, pace, database_url
        self._folder = attempt_folder(job.folder, job.fence)
        self._tail, self._report = EventTail(self._folder / EVENTS), Report()
        self._renewed = time.monotonic()
        self._stopping: float | None = None  # since when
        self._flags = Flags(cancel=False, pause=False)

    def run(self, stop: Callable[[], bool]) -> None:
        """Work until the job has ended, was released, or belongs to another worker.

        Args:
            stop: Says whether the worker itself is to end; the job is then saved and released.
        """
        try:
            handle = self._start()
        except (StorageError, UnavailableError) as error:  # of this machine or its scheduler, and not of the job
            if isinstance(error, UnavailableError) and self._job.attempts >= self._job.max_attempts:
                sentence = str(error)
                self._write(lambda: self._store.fail(self._job, sentence, UnavailableError.__name__))
                return
            self._write(lambda: self._store.release(self._job, _LATER_S, count_attempt=True))
            return
        except HaoriError as error:
            sentence, kind = str(error), type(error).__name__
            self._write(lambda: self._store.fail(self._job, sentence, kind))
            return
        held = True
        while held:
            alive = self._launcher.alive(handle)  # before the events: what is written before the end is then read
            held = self._say() and self._renew()
            if not alive:
                break
            self._stop_if_asked(handle, stop)
            time.sleep(self._pace.poll_s)
        if not held:
            self._launcher.stop(handle, kill=True)
        ending = self._launcher.ending(handle)
        if held:
            self._settle(ending)

    def _start(self) -> str:
        """End what an earlier attempt left running here, take its work over, and start the process."""
        job = self._job
        task = task_of_kind(job.kind)
        for number, path in attempts_of(job.folder):
            if number < job.fence:
                self._end_leftover(path)
        take_over(job.folder, job.fence)
        touch(self._folder)
        spec = JobSpec(task=task, arguments=job.spec, folder=self._folder)
        write_text(self._folder / JOB, spec.model_dump_json(indent=1))
        command = [sys.executable, "-m", "haori.jobs.queue.child", str(self._folder)]
        handle = self._launcher.start(command, self._folder, self._environment())
        write_text(self._folder / PROCESS, json.dumps({"launcher": self._launcher.name, "handle": handle}))
        return handle

    def _end_leftover(self, path: Path) -> None:
        try:
            held = json.loads((path / PROCESS).read_bytes())
        except (OSError, ValueError):
            return
        if held.get("launcher") == self._launcher.name and self._launcher.alive(held["handle"]):
            self._launcher.stop(held["handle"], kill=True)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith(_PREFIXES)}
        kept["HAORI_LEASE_S"] = str(self._pace.lease_s)
        return kept if self._url is None else {**kept, "HAORI_DATABASE": self._url}

    def _say(self) -> bool:
        """Pass on what the process reported; False if the job is no longer this worker's."""
        new = self._report.take(self._tail.read())
        if new and not self._write(lambda: self._store.add_events(self._job, new)):
            return False
        progress = self._report.progress
        if progress is not None and progress != self._job.progress:
            if not self._write(lambda: self._store.set_progress(self._job, progress)):
                return False
            self._job = self._job.model_copy(update={"progress": progress})
        return True

    def _renew(self) -> bool:
        """Renew the lease when it is time; False once the job belongs to another."""
        if time.monotonic() - self._renewed < self._pace.heartbeat_s:
            flags = self._try(lambda: self._store.flags(self._job))
        else:
            flags = self._try(lambda: self._store.heartbeat(self._job, self._pace.lease_s))
            if isinstance(flags, Flags):
                self._renewed = time.monotonic()
                touch(self._folder)
        if isinstance(flags, StorageError):
            return time.monotonic() - self._renewed < self._pace.lease_s
        if flags is not None:
            self._flags = flags
        return flags is not None

    def _stop_if_asked(self, handle: str, stop: Callable[[], bool]) -> None:
        asked = stop() or self._flags.cancel or self._flags.pause
        if self._stopping is None and asked:
            self._stopping = time.monotonic()
            self._launcher.stop(handle)
        elif self._stopping is not None and time.monotonic() - self._stopping > self._pace.grace_s:
            self._launcher.stop(handle, kill=True)

    def _settle(self, ending: str) -> None:
        """Write what came of the attempt."""
        try:
            result = JobResult.model_validate_json((self._folder / RESULT).read_bytes())
        except (OSError, ValueError):
            result = None
        store, job = self._store, self._job
        if result is not None and result.value is not None:
            value, tokens = result.value, result.value.get("tokens")
            self._write(lambda: store.finish(job, value, tokens=tokens))
        elif self._stopping is not None or (result is not None and result.kind == "StoppedError"):
            self._write(lambda: store.release(job))
        elif result is not None and result.kind == DatabaseError.__name__:  # of the moment, and not of the job
            self._write(lambda: store.died(job, "Its process got no answer from the database."))
        elif result is not None:
            self._write(lambda: store.fail(job, f"{result.error}", result.kind or "HaoriError"))
        else:
            self._write(lambda: store.died(job, f"Its process {ending}, without a result."))

    def _write(self, change: Callable[[], bool]) -> bool:
        """Write to the database, again and again while it cannot be reached and the lease holds."""
        while True:
            done = self._try(change)
            if not isinstance(done, StorageError):
                return done
            if time.monotonic() - self._renewed > self._pace.lease_s:
                return False
            time.sleep(self._pace.poll_s)

    @staticmethod
    def _try(call: Callable[[], _T]) -> _T | StorageError:
        try:
            return call()
        except StorageError as error:
            return error
