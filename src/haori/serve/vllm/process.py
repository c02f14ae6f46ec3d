"""Starts a vLLM server over a base as a child process, and ends it with all that it started.

The server listens on 127.0.0.1 with a key that only this process knows: its routes that load adapters are not made to
be open to others. What it writes goes to a file, whose last lines are shown when it does not come up.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import HaoriError, InputError, MissingExtraError
from haori.core.storage import explain_os_errors, make_folder

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["VllmProcess"]

_GRACE_S = 10.0
_OURS = frozenset({"--host", "--port", "--api-key", "--enable-lora", "--served-model-name", "--uds"})
_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
_TAIL_BYTES = 6000


class VllmProcess:
    """A running `vllm serve`.

    Args:
        base: What it is to serve.
        log: File for what it writes.
        options: Its options by name, such as `--max-loras`; each is left out where `extra` has it.
        extra: Further arguments, as they are.

    Attributes:
        url: Its address.
        key: What it is to be asked with.
        log: The file.
        closed: Whether it was ended from here.

    Raises:
        MissingExtraError: vLLM is not installed.
        InputError: An extra argument would take the server out of our hands.
    """

    def __init__(self, base: "Base", log: Path, *, options: dict[str, str], extra: Sequence[str] = ()) -> None:
        given = {argument.partition("=")[0].replace("_", "-") for argument in extra if argument.startswith("--")}
        if taken := sorted(given & _OURS):
            raise InputError(f"--vllm-arg cannot set {taken[0]}, which haori sets itself; take it out.")
        program = shutil.which("vllm")
        if program is None:
            raise MissingExtraError(
                "There is no program `vllm` on the PATH; run `pip install vllm` in an environment of its own and put "
                "its bin folder on the PATH, or attach to a server that runs with --vllm-url http://HOST:PORT."
            )
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.key = secrets.token_hex(16)
        self.log = log
        command = [program, "serve", str(base.path), "--host", "127.0.0.1", "--port", str(port), "--enable-lora"]
        for name, value in options.items():
            command += [] if name in given else [name, value] if value else [name]
        self._command = [sys.executable, "-m", "haori.serve.vllm.guard", str(_GRACE_S), *command, *extra]
        self._lock = threading.Lock()
        self.closed = False
        make_folder(log.parent)
        self._process = self._begin("wb")

    @property
    def running(self) -> bool:
        """Say whether it has not ended."""
        return self._process.poll() is None

    def start_again(self) -> None:
        """Start a server that has ended once more, at the same address and with the same key; not after `close`.

        Raises:
            StorageError: Its log cannot be written.
            OSError: The system has no room for another process.
        """
        with self._lock:
            if not self.closed:
                self._end()
                self._process = self._begin("ab")

    def _begin(self, mode: str) -> "subprocess.Popen[bytes]":
        with explain_os_errors(self.log), self.log.open(mode) as output:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **_ENVIRONMENT, "VLLM_API_KEY": self.key},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
            )

    def ended(self) -> HaoriError:
        """Return the error that says that it ended, with the last lines that it wrote."""
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "it wrote nothing")
        status = self._process.poll()
        return HaoriError(f"vLLM ended with status {status}: {reason.strip()[:400]} (more is in {str(self.log)!r}).")

    def close(self) -> None:
        """End it and everything that it started, for good, and wait until it is gone."""
        with self._lock:
            self.closed = True
            self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_GRACE_S + 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
