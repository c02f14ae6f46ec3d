"""The child's side of `process.py`: `python -m haori.jobs.child SPEC.json`.

Standard output carries events (`haori.core.events`) alone, one JSON object a line, and at the end
`{"result": JobResult}`. Whatever else is printed, by Python or below it, goes to standard error.
"""

import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from haori.core.events import EventSink
    from haori.jobs.process import JobResult, JobSpec

__all__ = ["do_work", "end_with_parent", "main"]


def main() -> None:
    """Do the job that the first argument describes, and send its result."""
    channel = _own_channel()
    end_with_parent()
    from haori.jobs.process import JobSpec

    spec = JobSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    result = do_work(spec, lambda event: _send(channel, event.model_dump_json()))
    _send(channel, f'{{"result": {result.model_dump_json()}}}')
    channel.close()


def do_work(spec: "JobSpec", on_event: "EventSink", *further: object) -> "JobResult":
    """Call what the job names, with its arguments, whatever is `further`, and the sink; return what came of it."""
    from haori.core.errors import HaoriError
    from haori.jobs.process import JobResult

    module, _, function = spec.task.partition(":")
    try:
        value = getattr(import_module(module), function)(spec.arguments, *further, on_event)
    except HaoriError as error:
        return JobResult(error=str(error), kind=type(error).__name__)
    except Exception as error:  # noqa: BLE001 - the boundary of the process: the log keeps the trace
        traceback.print_exc()
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return JobResult(error="Memory ran out; lower training.micro_batch_tokens.", kind="TrainingError")
        first = (str(error).strip() or "no message").splitlines()[0][:300].rstrip(".")
        where = str(spec.folder / "log.txt")
        return JobResult(error=f"{type(error).__name__}: {first}; the trace is in {where!r}.", kind="HaoriError")
    return JobResult(value=value)


def end_with_parent() -> None:
    """Kill this process as soon as the parent is gone, however it went: its end of the pipe is then closed."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _own_channel() -> TextIO:
    """Keep standard output for events and send what others print there to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return channel


def _send(channel: TextIO, line: str) -> None:
    channel.write(f"{line}\n")


if __name__ == "__main__":
    main()
