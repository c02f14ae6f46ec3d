"""Refuses requests without access and bodies that are too large, before a body is read into memory."""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from haori.core.errors import HaoriError
from haori.server.access import Access
from haori.server.errors import ApiError, error_reply, noted_reply
from haori.server.request_note import note_of

__all__ = ["Gate"]


class Gate:
    """ASGI middleware that admits a request, with its caller in `scope["haori.caller"]`, or replies with the error.

    Args:
        app: What it passes requests on to.
        access: Who may ask.
        max_body_bytes: Gives the largest body of a path.
    """

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: Callable[[str], int]) -> None:
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reply."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        headers = Headers(scope=scope)
        most = self._max_body_bytes(scope["path"])
        try:
            caller = self._access.admit(scope["path"], headers, client[0] if client else None)
            _check_length(headers.get("content-length", ""), most)
        except (ApiError, HaoriError) as error:
            path = scope["path"]
            reply = error_reply(error, path) if isinstance(error, ApiError) else noted_reply(scope, error)
            await reply(scope, receive, send)
            return
        scope["haori.caller"] = caller
        if caller is not None and caller.key is not None:
            note_of(scope).key = caller.key.name
        await self._app(scope, _counted(receive, most), send)


def _check_length(given: str, most: int) -> None:
    if given.isascii() and given.isdigit() and int(given[:20]) > most:
        raise ApiError(413, f"The request has {given[:20]} bytes; at most {most} are read.")


def _counted(receive: Receive, most: int) -> Receive:
    """Count a body without Content-Length while it is received."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            # FastAPI lets this kind of error through while it reads a body.
            raise HTTPException(413, f"The request is too long; at most {most} bytes are read.")
        return message

    return counted
