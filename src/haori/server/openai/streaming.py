"""Answers as server-sent events: `data: {...}` for each piece, `data: [DONE]` at the end."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from haori.core.errors import HaoriError
from haori.serve.request import Delta
from haori.server.answers import Answers
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError, api_error_of

__all__ = ["ChunkForm", "EventStream"]

_DONE = b"data: [DONE]\n\n"


class ChunkForm(Protocol):
    """How a route writes its chunks."""

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return the chunks before any text."""

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a piece, or None where there is nothing to say."""

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the chunks after the last piece."""


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
            yield _event(chunk)
        try:
            async for index, delta in self._answers.pieces():
                if (piece := self._form.piece(index, delta)) is not None:
                    yield _event(piece)
        except (ApiError, HaoriError) as error:  # too late for a status: the clients look for this event
            reply = error if isinstance(error, ApiError) else api_error_of(error)
            yield _event(reply.body())
            return
        for chunk in self._form.closing(self._answers):
            yield _event(chunk)
        yield _DONE


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
