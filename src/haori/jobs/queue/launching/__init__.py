"""Where the process of an attempt runs: on this machine, or wherever a scheduler puts it.

A handle is text that names the process, and means the same to another worker of that machine or scheduler. A process
that a scheduler runs needs the folder of jobs and this Python on its machine, at the same paths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from haori.core.errors import InputError

__all__ = ["Launcher", "launcher_named"]


class Launcher(Protocol):
    """Starts, watches and ends processes."""

    name: str

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """Start a command that prints into `log.txt` in the folder; return its handle.

        Raises:
            HaoriError: It cannot be started.
        """

    def alive(self, handle: str) -> bool:
        """Say whether it runs, or waits to."""

    def stop(self, handle: str, *, kill: bool = False) -> None:
        """Ask it to save and end (SIGTERM), or end it at once; nothing happens if it has ended."""

    def ending(self, handle: str) -> str:
        """Return in a few words how it ended, as far as that is known."""


def launcher_named(name: str) -> Launcher:
    """Return the launcher `local`, `ray` or `slurm`.

    Raises:
        InputError: There is no such launcher, or its settings cannot be used.
        MissingExtraError: What it needs is not installed.
        UnavailableError: Its scheduler cannot be reached.
    """
    if name == "local":
        from haori.jobs.queue.launching.local import LocalLauncher

        return LocalLauncher()
    if name == "ray":
        from haori.jobs.queue.launching.ray_jobs import RayLauncher

        return RayLauncher()
    if name == "slurm":
        from haori.jobs.queue.launching.slurm import SlurmLauncher

        return SlurmLauncher()
    raise InputError(f"There is no launcher {name!r}; there are local, ray and slurm.")
