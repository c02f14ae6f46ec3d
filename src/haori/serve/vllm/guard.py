"""Runs a command for as long as its own standard input stays open, and ends everything that the command started.

The parent holds the other end. However the parent ends, a kill -9 included, the system closes it; so no vLLM stays
behind with a graphics card full of weights. Run as `python -m haori.serve.vllm.guard SECONDS COMMAND...`.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

__all__ = ["guard"]


def guard(command: list[str], grace_s: float) -> int:
    """Run a command until it ends or standard input is closed; return its exit status.

    Args:
        command: What to run, in a process group of its own.
        grace_s: Time that it has after SIGTERM.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        with suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
        _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        _signal(process.pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    _signal(process.pid, signal.SIGKILL)  # what it left behind
    return status


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent's word counts, and that is standard input
    sys.exit(guard(sys.argv[2:], float(sys.argv[1])) & 0xFF)
