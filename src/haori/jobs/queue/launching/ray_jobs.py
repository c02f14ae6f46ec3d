"""Runs the process of an attempt as a job of a Ray cluster (Ray Jobs, REST).

The cluster's address is RAY_ADDRESS. What a job reserves is in HAORI_RAY_JOB, by the names of `submit_job`:
`{"entrypoint_num_gpus": 1}`. Ray ends a job with SIGTERM and, after RAY_JOB_STOP_WAIT_TIME_S, SIGKILL: by itself after
3 seconds, in which few could save, so each job is given a minute.

What Ray is told of a job, its dashboard shows to everybody. The environment, with the database's password, therefore
goes through a file beside the job, which is deleted as it is read.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from haori.core.errors import InputError, MissingExtraError, UnavailableError
from haori.core.settings import settings
from haori.core.storage import explain_os_errors
from haori.jobs.queue.folders import LOG

__all__ = ["RayLauncher"]

_ALIVE = ("PENDING", "RUNNING")
_GRACE_S = 60
_ENVIRONMENT = "environment.sh"
_RESERVED = (
    "entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory", "entrypoint_resources",
    "entrypoint_label_selector",
)  # fmt: skip


class RayLauncher:
    """Submits attempts to a Ray cluster.

    Args:
        client: A `ray.job_submission.JobSubmissionClient`; by default one for RAY_ADDRESS.

    Raises:
        MissingExtraError: Ray is not installed.
        UnavailableError: The cluster does not answer.
        InputError: HAORI_RAY_JOB holds a key that there is not.
    """

    name = "ray"

    def __init__(self, client: Any = None) -> None:
        self._reserved = dict(settings().ray_job)
        if unknown := sorted(self._reserved.keys() - set(_RESERVED)):
            raise InputError(f"HAORI_RAY_JOB cannot hold {unknown[0]!r}; it holds {', '.join(_RESERVED)}.")
        self._client = _connect() if client is None else client
        self._failures = _failures()

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """Submit the command, which prints into the folder that all machines see.

        Raises:
            UnavailableError: The cluster does not take it.
        """
        place, file, log = (shlex.quote(str(path)) for path in (folder, folder / _ENVIRONMENT, folder / LOG))
        _write_environment(folder / _ENVIRONMENT, environment)
        # In a folder without modules: Ray starts jobs where the cluster was started, and `python -m` looks there first.
        entry = f"{{ cd {place} && . {file} && rm -f {file} && exec {shlex.join(command)} ; }} >> {log} 2>&1"
        passed = {"RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_S)}
        try:
            return str(self._client.submit_job(entrypoint=entry, runtime_env={"env_vars": passed}, **self._reserved))
        except self._failures as error:
            (folder / _ENVIRONMENT).unlink(missing_ok=True)
            raise UnavailableError(f"Ray did not take the job: {_first_line(error)}.") from None

    def alive(self, handle: str) -> bool:
        """Say whether the job runs or waits; one that the cluster no longer knows does not."""
        try:
            status = self._client.get_job_status(handle)
        except self._failures as error:
            return "does not exist" not in str(error)  # else the cluster is not reached, and the job may well run
        return str(getattr(status, "value", status)) in _ALIVE

    def stop(self, handle: str, *, kill: bool = False) -> None:
        """Ask Ray to stop the job; it kills it by itself after a while."""
        with suppress(*self._failures):
            self._client.stop_job(handle)

    def ending(self, handle: str) -> str:
        """Return what Ray says of the end."""
        try:
            info = self._client.get_job_info(handle)
        except self._failures:
            return "is gone"
        said = str(info.message or "").strip().splitlines()
        return f"ended on Ray ({said[0][:200].rstrip('.') if said else info.status})"


def _connect() -> Any:
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise MissingExtraError("The launcher ray needs Ray: pip install 'haori[ray]'.") from None
    try:
        return JobSubmissionClient()
    except _failures() as error:
        where = os.environ.get("RAY_ADDRESS", "not set")
        raise UnavailableError(f"No Ray cluster answers (RAY_ADDRESS is {where}): {_first_line(error)}.") from None


def _failures() -> tuple[type[Exception], ...]:
    """Return what Ray's client raises where a cluster refuses something, or is not reached (an OSError)."""
    try:
        from ray.exceptions import RayError
    except ImportError:
        return RuntimeError, OSError
    return RuntimeError, OSError, RayError


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no answer"])[0].rstrip(".")


def _write_environment(path: Path, environment: Mapping[str, str]) -> None:
    """Write what a shell reads to have these variables, for this account alone."""
    passed = {name: value for name, value in environment.items() if name.startswith(("HAORI_", "HF_", "PYTHON"))}
    with explain_os_errors(path):
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(passed.items()))
