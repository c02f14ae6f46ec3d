"""A whole reply with log-probabilities, encoded part by part as its client reads it.

As JSON, twenty log-probabilities of each token take ten times the memory that they take as the engine's records; of
a slow client's reply only the records wait.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from haori.server.answers import Answers
from haori.server.disconnect import until_disconnect
from haori.server.front import ClientGoneError

__all__ = ["WholeReply", "written"]

_PART = 16384  # characters, or a few more
_PATIENCE_S = 300.0


class WholeReply(Response):
    """Sends JSON part by part.

    Args:
        answers: What is answered; closed at the end.
        content: Keys and values; an iterator stands for the list of its items.
    """

    media_type = "application/json"

    def __init__(self, answers: Answers, content: dict[str, Any]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._answers = answers
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything.

        Raises:
            ClientGoneError: The client left first, or reads nothing.
        """
        try:
            await until_disconnect(self._send_all(send), receive)
        finally:
            self._answers.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in written(self._content):
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
            except TimeoutError:
                raise ClientGoneError from None
            await asyncio.sleep(0)  # lets other tasks run
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def written(content: dict[str, Any]) -> Iterator[str]:
    """Yield JSON in parts.

    Args:
        content: Keys and values; an iterator stands for the list of its items, which are made when they are due.
    """
    held: list[str] = []
    size = 0
    for part in _parts(content):
        held.append(part)
        size += len(part)
        if size >= _PART:
            yield "".join(held)
            held, size = [], 0
    yield "".join(held)


def _parts(value: Any) -> Iterator[str]:
    if isinstance(value, Iterator):
        before = "["
        for item in value:
            yield before + _json(item)
            before = ","
        yield "[]" if before == "[" else "]"
    elif value and isinstance(value, dict):
        before = "{"
        for key, item in value.items():
            yield f"{before}{_json(key)}:"
            yield from _parts(item)
            before = ","
        yield "}"
    elif value and isinstance(value, list):
        before = "["
        for item in value:
            yield before
            yield from _parts(item)
            before = ","
        yield "]"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
