"""Runs the process of an attempt as a job of a Ray cluster (Ray Jobs, REST).

The cluster's address is RAY_ADDRESS. What a job reserves is in HAORI_RAY_JOB, by the names of `submit_job`:
`{"entrypoint_num_gpus": 1}`. Ray ends a job with SIGTERM and, after RAY_JOB_STOP_WAIT_TIME_S on the cluster, SIGKILL.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from haori.core.errors import InputError, MissingExtraError, UnavailableError
from haori.core.settings import settings
from haori.jobs.queue.folders import LOG

__all__ = ["RayLauncher"]

_ALIVE = ("PENDING", "RUNNING")
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

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """Submit the command, which prints into the folder that all machines see.

        Raises:
            UnavailableError: The cluster does not take it.
        """
        entry = f"exec {shlex.join(command)} >> {shlex.quote(str(folder / LOG))} 2>&1"
        passed = {name: value for name, value in environment.items() if name.startswith(("HAORI_", "HF_", "PYTHON"))}
        try:
            return str(self._client.submit_job(entrypoint=entry, runtime_env={"env_vars": passed}, **self._reserved))
        except RuntimeError as error:
            raise UnavailableError(f"Ray did not take the job: {str(error).splitlines()[0]}.") from None

    def alive(self, handle: str) -> bool:
        """Say whether the job runs or waits; one that the cluster no longer knows does not."""
        try:
            status = self._client.get_job_status(handle)
        except RuntimeError as error:
            return "does not exist" not in str(error)  # else the cluster is not reached, and the job may well run
        return str(getattr(status, "value", status)) in _ALIVE

    def stop(self, handle: str, *, kill: bool = False) -> None:
        """Ask Ray to stop the job; it kills it by itself after a while."""
        with suppress(RuntimeError):
            self._client.stop_job(handle)

    def ending(self, handle: str) -> str:
        """Return what Ray says of the end."""
        try:
            info = self._client.get_job_info(handle)
        except RuntimeError:
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
    except (ConnectionError, RuntimeError) as error:
        where = os.environ.get("RAY_ADDRESS", "not set")
        reason = (str(error).splitlines() or ["no answer"])[0].rstrip(".")
        raise UnavailableError(f"No Ray cluster answers (RAY_ADDRESS is {where}): {reason}.") from None
