"""One piece of work in a process of its own, so that its peak memory, seeds and crashes are its own.

The child is `python -m haori.jobs.child SPEC.json`. It sends its events (`haori.core.events`) and then its result as
JSON lines; whatever else is printed goes to a log. The child ends when its parent ends, however that happens: it
watches its standard input, which only the parent holds open. What the work is, this module does not know.

    job.json      what was asked (JobSpec)
    result.json   what came of it (JobResult), once the child has ended
    log.txt       what the child and its libraries printed
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from haori.core import errors
from haori.core.events import Event, EventReader, EventSink, Warned, discard
from haori.core.records import Record
from haori.core.storage import explain_os_errors, make_folder, write_text

__all__ = ["JobResult", "JobSpec", "run_job"]

_JOB, _RESULT, _LOG = "job.json", "result.json", "log.txt"
_KILLED = 9  # SIGKILL, which the system also sends when memory runs out


class JobSpec(Record):
    """What a child process is to do."""

    task: str = Field(
        pattern=r"^[\w.]+:\w+$",
        description="`package.module:function`; called as function(arguments, on_event), returns JSON data.",
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="JSON data handed to the function.")
    folder: Path = Field(description="Folder of the job, made if absent; holds job.json, result.json and log.txt.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables set for the child, HAORI_* say.")


class JobResult(Record):
    """What came of it: a value, or the one sentence of its error."""

    value: dict[str, Any] | None = None
    error: str | None = None
    kind: str | None = Field(default=None, description="Class of the error, as named in haori.core.errors.")

    def require(self) -> dict[str, Any]:
        """Return the value.

        Raises:
            HaoriError: The error of the child, of the same class and with the same sentence.
        """
        if self.value is not None:
            return self.value
        kind = getattr(errors, self.kind or "", errors.HaoriError)
        raise kind(self.error or "The job ended without a result.")


def run_job(
    spec: JobSpec,
    *,
    on_event: EventSink = discard,
    stop: Callable[[], bool] = lambda: False,
) -> JobResult:
    """Run a job in a child process and wait for it; a failure of the job is part of the result.

    Args:
        spec: The job.
        on_event: Receives what the work reports, each event with the name of the job's folder as its `job`. What it
            raises ends the child and is raised.
        stop: Asked after each event; once it says yes the child gets SIGTERM, upon which training saves and ends.

    Raises:
        StorageError: The folder cannot be written.
        KeyboardInterrupt: The parent was interrupted; the child has been killed.
    """
    make_folder(spec.folder)
    write_text(spec.folder / _JOB, spec.model_dump_json(indent=1))
    (spec.folder / _RESULT).unlink(missing_ok=True)
    with explain_os_errors(spec.folder / _LOG), (spec.folder / _LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "haori.jobs.child", str(spec.folder / _JOB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **spec.environment},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        result = _follow(process, log, lambda event: on_event(event.model_copy(update={"job": spec.folder.name})), stop)
    if result is None:
        result = JobResult(error=_sudden_end(process.returncode, spec.folder / _LOG), kind="HaoriError")
    write_text(spec.folder / _RESULT, result.model_dump_json(indent=1))
    return result


def _follow(
    process: "subprocess.Popen[bytes]", log: IO[bytes], on_event: EventSink, stop: Callable[[], bool]
) -> JobResult | None:
    """Pass events on until the child has ended; return its result, if it gave one."""
    assert process.stdin is not None and process.stdout is not None
    result: JobResult | None = None
    reader = EventReader()
    stopping = False
    try:
        for line in process.stdout:
            got = _read(line, reader)
            if isinstance(got, JobResult):
                result = got
            elif isinstance(got, bytes):
                log.write(got)  # of a library, or cut off by the child's death
                log.flush()
            elif got is not None:
                on_event(got)
            if not stopping and stop():
                stopping = True
                process.terminate()
        process.wait()
        for kind, count in reader.skipped.items():
            on_event(
                Warned(text=f"Events of the kind {kind!r}, which this version cannot read, were skipped: {count}.")
            )
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()
    return result


def _read(line: bytes, reader: EventReader) -> Event | JobResult | bytes | None:
    """Return what a line of the child is: an event, its result, anything else as it is, None for an unknown event."""
    try:
        document = json.loads(line)
        if isinstance(document, dict) and "result" in document:
            return JobResult.model_validate(document["result"])
        return reader.read(line)
    except ValueError:
        return line


def _sudden_end(code: int, log: Path) -> str:
    if code == -_KILLED:
        return "The process was killed, most likely because memory ran out; lower training.micro_batch_tokens."
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"The process ended {how} and without a result; its output is in {str(log)!r}."
