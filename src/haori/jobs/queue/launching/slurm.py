"""Runs the process of an attempt as a job of Slurm, through submitit.

What the job asks for is in HAORI_SLURM, by the names of submitit's `AutoExecutor.update_parameters`:
`{"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 240}`; `cluster` chooses another executor, `local` say.
Slurm's warning before its time limit (SIGUSR2, 90 s before, as submitit sets it) saves and releases the job.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from haori.core.errors import InputError, MissingExtraError, UnavailableError
from haori.core.settings import settings
from haori.jobs.queue.folders import LOG

__all__ = ["SlurmLauncher"]

_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "UNKNOWN")


class SlurmLauncher:
    """Submits attempts to Slurm.

    Raises:
        MissingExtraError: submitit is not installed.
    """

    name = "slurm"

    def __init__(self) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingExtraError("The launcher slurm needs submitit: pip install 'haori[slurm]'.") from None
        self._submitit = submitit
        self._jobs: dict[str, Any] = {}

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """Submit the command, which prints into the folder that all machines see.

        Raises:
            InputError: HAORI_SLURM holds something that submitit does not know.
            UnavailableError: Slurm does not take the job.
        """
        given = dict(settings().slurm)
        cluster = given.pop("cluster", None)
        place = folder / "submitit"
        try:
            executor = self._submitit.AutoExecutor(folder=place, cluster=cluster)
            executor.update_parameters(**given)
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise InputError(f"HAORI_SLURM cannot be used: {str(error).splitlines()[0].rstrip('.')}.") from None
        except RuntimeError as error:  # no sbatch on this machine
            raise UnavailableError(f"Slurm is not there: {str(error).splitlines()[0].rstrip('.')}.") from None
        try:
            job = executor.submit(become, list(command), str(folder / LOG), dict(environment))
        except self._submitit.core.utils.FailedJobError as error:
            raise UnavailableError(f"Slurm did not take the job: {str(error).splitlines()[0].rstrip('.')}.") from None
        handle = f"{executor.cluster} {job.job_id} {place}"
        self._jobs[handle] = job
        return handle

    def alive(self, handle: str) -> bool:
        """Say whether the job runs or waits."""
        job = self._job(handle)
        return str(job.watcher.get_state(job.job_id, mode="force") if _is_slurm(handle) else job.state) in _ALIVE

    def stop(self, handle: str, *, kill: bool = False) -> None:
        """Cancel the job: SIGTERM, and SIGKILL after Slurm's KillWait."""
        self._job(handle).cancel(check=False)

    def ending(self, handle: str) -> str:
        """Return the state that it ended in, and forget it."""
        job = self._job(handle)
        self._jobs.pop(handle, None)
        return f"ended on Slurm ({job.state})"

    def _job(self, handle: str) -> Any:
        if handle not in self._jobs:
            cluster, job_id, place = handle.split(" ", 2)
            kind = self._submitit.SlurmJob if cluster == "slurm" else self._submitit.LocalJob
            self._jobs[handle] = kind(place, job_id)
        return self._jobs[handle]


def become(command: list[str], log: str, environment: dict[str, str]) -> None:
    """Turn this process into the command, which prints into the log; so signals of the scheduler reach it."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    kept = {name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "CUDA_"))}
    os.execve(command[0], command, {**environment, **kept})  # noqa: S606 - a list, and no shell is wanted


def _is_slurm(handle: str) -> bool:
    return handle.startswith("slurm ")
