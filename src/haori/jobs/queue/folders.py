"""The folder of a job: one folder for each attempt, and the work itself, which goes from attempt to attempt.

    <jobs>/<id>/attempt-<fence>/job.json     what the child was asked to do
                                process.json pid and start time of its process, and where it runs
                                events.jsonl what it reported
                                log.txt      what it and its libraries printed
                                result.json  what came of it
                                beat         touched by the worker whenever it has renewed its lease
                                work/        what it makes: run folder, checkpoints, adapter

A new attempt takes `work` over by renaming it into its own folder. Whoever still works for an older attempt then writes
to a path that is gone, and never into the new attempt's files.
"""

import os
import re
from pathlib import Path

from haori.core.storage import explain_os_errors, make_folder

__all__ = [
    "BEAT",
    "EVENTS",
    "JOB",
    "LOG",
    "PROCESS",
    "RESULT",
    "WORK",
    "attempt_folder",
    "attempts_of",
    "last_log_lines",
    "latest_work",
    "take_over",
    "touch",
]

JOB, PROCESS, EVENTS, LOG, RESULT = "job.json", "process.json", "events.jsonl", "log.txt", "result.json"
BEAT, WORK = "beat", "work"
_ATTEMPT = re.compile(r"attempt-(\d+)")
_TAIL_BYTES = 4096


def attempt_folder(folder: Path, fence: int) -> Path:
    """Return the folder of an attempt."""
    return folder / f"attempt-{fence}"


def attempts_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the fences and folders of the attempts that there are, the earliest first."""
    if not folder.is_dir():
        return []
    found = [(_ATTEMPT.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match.group(1)), path) for match, path in found if match is not None)


def take_over(folder: Path, fence: int) -> Path:
    """Make the folder of an attempt with the work of the latest before it; return the folder of the work.

    Raises:
        StorageError: It cannot be written.
    """
    mine = make_folder(attempt_folder(folder, fence))
    work = mine / WORK
    before = [path / WORK for number, path in attempts_of(folder) if number < fence and (path / WORK).is_dir()]
    if not work.exists() and before:
        with explain_os_errors(work):
            before[-1].rename(work)
    return make_folder(work)


def latest_work(folder: Path) -> Path | None:
    """Return the folder of a job's work, as far as it has come; None before its first attempt."""
    found = [path / WORK for _, path in attempts_of(folder) if (path / WORK).is_dir()]
    return found[-1] if found else None


def touch(attempt: Path) -> None:
    """Tell the process of an attempt that its worker holds the lease; takes no space, so a full disk allows it."""
    beat = attempt / BEAT
    if beat.exists():
        os.utime(beat)
    else:
        beat.touch()


def last_log_lines(folder: Path, fence: int, count: int = 5) -> str:
    """Return the last lines of an attempt's log, joined by " | "; "" if there is none."""
    try:
        with (attempt_folder(folder, fence) / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return " | ".join(line.strip() for line in lines[-count:] if line.strip())
