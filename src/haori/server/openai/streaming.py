"""Answers as server-sent events: `data: {...}` for each event, and what the form ends a stream with."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, ClassVar, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from haori.core.errors import HaoriError
from haori.serve.request import StreamChunk
from haori.server.answers import Answers
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError, api_error_of

__all__ = ["DONE", "EventForm", "EventStream"]

DONE = b"data: [DONE]\n\n"
"""How OpenAI's chat and completion streams end."""


class EventForm(Protocol):
    """How a route writes the events of a stream.

    Attributes:
        named: Whether each event bears its `type` as a name.
        end: What a stream that went well ends with.
    """

    named: ClassVar[bool]
    end: ClassVar[bytes]

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return the events before any text."""

    def events(self, index: int, chunk: StreamChunk) -> Iterable[dict[str, Any]]:
        """Return the events for a stream chunk; none if it adds nothing."""

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the events after the last chunk."""

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the events that report a failed answer."""


class EventStream(Response):
    """Sends the chunks of answers as they come; a client that disconnects ends them."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: EventForm) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers = answers
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything.

        Raises:
            ClientGoneError: The client left first.
        """
        try:
            await until_disconnect(self._send_all(send), receive)
        finally:
            self._answers.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        for event in self._form.opening(self._answers.count):
            yield self._event(event)
        try:
            async for index, chunk in self._answers.chunks():
                for event in self._form.events(index, chunk):
                    yield self._event(event)
        except (ApiError, HaoriError) as error:  # too late for a status: the clients look for these events
            for event in self._form.failure(error if isinstance(error, ApiError) else api_error_of(error)):
                yield self._event(event)
            return
        for event in self._form.closing(self._answers):
            yield self._event(event)
        if self._form.end:
            yield self._form.end

    def _event(self, content: dict[str, Any]) -> bytes:
        name = f"event: {content['type']}\n".encode() if self._form.named else b""
        return name + b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
