"""The process of one attempt at a job: `python -m haori.jobs.queue.child ATTEMPT_FOLDER`.

It writes its events, its log and its result to files in that folder (see `folders.py`), so that nothing it prints can
ever block it. It ends at once when its worker is gone: the pipe that is its standard input closes, or, where it has
none, the worker stops touching `beat` for as long as a lease lasts. What stopped in time (SIGTERM) raises
`StoppedError`.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from haori.core.errors import HaoriError

__all__ = ["StoppedError", "main"]


class StoppedError(HaoriError):
    """The work was asked to stop (SIGTERM) and has saved what the next attempt goes on from."""


def main() -> None:
    """Work, and write the result; without one the attempt counts as dead."""
    from haori.core.storage import write_text
    from haori.jobs.child import do_work, end_with_parent
    from haori.jobs.process import JobSpec
    from haori.jobs.queue.event_file import EventWriter
    from haori.jobs.queue.folders import BEAT, EVENTS, JOB, RESULT, WORK

    folder = Path(sys.argv[1])
    if "--pipe" in sys.argv[2:]:
        end_with_parent()
    if hasattr(signal, "SIGUSR2"):  # Slurm's warning before its time limit
        signal.signal(signal.SIGUSR2, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    _end_without_beat(folder / BEAT, float(os.environ["HAORI_LEASE_S"]))
    spec = JobSpec.model_validate_json((folder / JOB).read_bytes())
    writer = EventWriter(folder / EVENTS)
    result = do_work(spec, writer, folder / WORK)
    writer.flush()
    write_text(folder / RESULT, result.model_dump_json(indent=1))


def _end_without_beat(beat: Path, lease_s: float) -> None:
    """Kill this process before its lease can run out unseen: once `beat` was not touched for most of that time."""

    def watch() -> None:
        seen, since = 0, time.monotonic()
        while time.monotonic() - since < 0.8 * lease_s:
            time.sleep(lease_s / 20)
            try:
                now = beat.stat().st_mtime_ns
            except OSError:
                continue
            if now != seen:
                seen, since = now, time.monotonic()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # As the module that others import, so that there is one StoppedError.
    from haori.jobs.queue.child import main as imported_main

    imported_main()
