"""Runs the process of an attempt on this machine, as a child of the worker that ends when the worker does."""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from haori.core.storage import explain_os_errors
from haori.jobs.queue.folders import LOG

__all__ = ["LocalLauncher"]


class LocalLauncher:
    """Runs attempts as child processes, each in a session of its own; they end when this process does."""

    name = "local"

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
        """Start the command; its standard input is a pipe that only this process holds open.

        Raises:
            StorageError: Its log cannot be written.
        """
        with explain_os_errors(folder / LOG), (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*command, "--pipe"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        handle = f"{socket.gethostname()} {process.pid} {_start_time(process.pid)}"
        self._children[handle] = process
        return handle

    def alive(self, handle: str) -> bool:
        """Say whether the process runs; one of another machine, or whose number another has now, does not."""
        if (child := self._children.get(handle)) is not None:
            return child.poll() is None
        host, pid, started = handle.rsplit(" ", 2)
        return host == socket.gethostname() and started not in ("", "0") and _start_time(int(pid)) == int(started)

    def stop(self, handle: str, *, kill: bool = False) -> None:
        """Signal the process and what it started."""
        if self.alive(handle):
            with suppress(ProcessLookupError):
                os.killpg(int(handle.rsplit(" ", 2)[1]), signal.SIGKILL if kill else signal.SIGTERM)

    def ending(self, handle: str) -> str:
        """Return how it ended, and forget it."""
        child = self._children.pop(handle, None)
        if child is None:
            return "is gone"
        assert child.stdin is not None
        child.stdin.close()
        code = child.wait()
        if code == -signal.SIGKILL:
            return "was killed, as the system does when memory runs out"
        return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since the machine did; 0 if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
