"""One line for each request on standard error, as JSON or for people; and unexpected errors."""

import json
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from haori.server.request_note import RequestNote

__all__ = ["AccessLog", "LogFormat"]

LogFormat = Literal["json", "text"]

_LONGEST = 200
_PROBES = frozenset({"/health", "/metrics"})


class AccessLog:
    """Writes lines to `stream` (standard error by default)."""

    def __init__(self, form: LogFormat = "json", stream: TextIO | None = None) -> None:
        self._form = form
        self._stream = sys.stderr if stream is None else stream

    def write(self, note: RequestNote) -> None:
        """Write the line of a request that has ended; successful probes are left out."""
        if note.status == 200 and note.path in _PROBES:
            return
        fields = _fields(note)
        self._put(fields if self._form == "json" else _line(fields))

    def event(self, sentence: str) -> None:
        """Write an event of the server."""
        self._put({"time": _time(), "event": sentence} if self._form == "json" else f"{_time()} {sentence}")

    def failure(self, note: RequestNote, error: BaseException) -> None:
        """Write an unexpected error with its traceback."""
        trace = "".join(traceback.format_exception(error))
        fields = {"time": _time(), "request_id": note.id, "path": note.path[:_LONGEST], "error": trace}
        self._put(fields if self._form == "json" else f"{_time()} {note.id} failed\n{trace}")

    def _put(self, what: dict[str, Any] | str) -> None:
        line = what if isinstance(what, str) else json.dumps(what)
        print(line, file=self._stream, flush=True)


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _fields(note: RequestNote) -> dict[str, Any]:
    first = None if note.first_token_s is None else round((note.first_token_s - note.started_s) * 1000, 1)
    return {
        "time": _time(),
        "request_id": note.id,
        "method": note.method,
        "path": note.path[:_LONGEST],
        "status": note.status,
        "duration_ms": round((time.perf_counter() - note.started_s) * 1000, 1),
        "client": note.client,
        "key": note.key,
        "model": None if note.model is None else note.model[:_LONGEST],
        "serves": note.serves,
        "adapters": list(note.adapters),
        "prompt_tokens": note.prompt_tokens,
        "cached_tokens": note.cached_tokens,
        "generated_tokens": note.generated_tokens,
        "ttft_ms": first,
        "finish": note.finish,
        **({} if note.pictures is None else {"pictures": note.pictures, "picture_steps": note.picture_steps}),
        **({} if note.error is None else {"error": note.error}),
    }


def _line(fields: dict[str, Any]) -> str:
    parts = [fields["time"], fields["method"], repr(fields["path"])[1:-1], str(fields["status"])]
    parts.append(f"{fields['duration_ms']:.0f} ms")
    if fields["model"] is not None:
        parts.append(repr(fields["model"]))
    if fields["generated_tokens"] is not None:
        parts.append(f"{fields['prompt_tokens']}+{fields['generated_tokens']} tokens")
    if fields["ttft_ms"] is not None:
        parts.append(f"first after {fields['ttft_ms']:.0f} ms")
    if "pictures" in fields:
        parts.append(f"{fields['pictures']} pictures in {fields['picture_steps']} steps")
    parts += [f"{name}={fields[name]}" for name in ("finish", "key") if fields[name] is not None]
    if "error" in fields:
        parts.append(repr(fields["error"]))
    return " ".join([*parts, fields["request_id"]])
