"""Answers as server-sent events: `data: {...}` for each chunk, and what the form ends a stream with."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, ClassVar, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from haori.core.errors import HaoriError
from haori.serve.request import Delta
from haori.server.answers import Answers
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError, api_error_of

__all__ = ["DONE", "ChunkForm", "EventStream"]

DONE = b"data: [DONE]\n\n"
"""How OpenAI's chat and completion streams end."""


class ChunkForm(Protocol):
    """How a route writes its chunks.

    Attributes:
        named: Whether each event bears its `type` as a name.
        end: What a stream that went well ends with.
    """

    named: ClassVar[bool]
    end: ClassVar[bytes]

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return the chunks before any text."""

    def piece(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """Return the chunks of a piece; none where there is nothing to say."""

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the chunks after the last piece."""

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the chunks that say that an answer went wrong."""


class EventStream(Response):
    """Sends the pieces of answers as they come; a client that leaves ends them."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: ChunkForm) -> None:
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
        for chunk in self._form.opening(self._answers.count):
            yield self._event(chunk)
        try:
            async for index, delta in self._answers.pieces():
                for chunk in self._form.piece(index, delta):
                    yield self._event(chunk)
        except (ApiError, HaoriError) as error:  # too late for a status: the clients look for these events
            for chunk in self._form.failure(error if isinstance(error, ApiError) else api_error_of(error)):
                yield self._event(chunk)
            return
        for chunk in self._form.closing(self._answers):
            yield self._event(chunk)
        if self._form.end:
            yield self._form.end

    def _event(self, content: dict[str, Any]) -> bytes:
        name = f"event: {content['type']}\n".encode() if self._form.named else b""
        return name + b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
