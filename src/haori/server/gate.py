"""Refuses requests without access and bodies that are too large, before a body is read into memory."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from haori.core.errors import HaoriError
from haori.server.access import Access
from haori.server.errors import ApiError, error_reply, noted_reply
from haori.server.request_note import note_of

__all__ = ["Gate"]


class Gate:
    """ASGI middleware that admits a request, with its caller in `scope["haori.caller"]`, or replies with the error."""

    def __init__(self, app: ASGIApp, access: Access, max_body_bytes: int) -> None:
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
        try:
            caller = self._access.admit(scope["path"], headers, client[0] if client else None)
            self._check_length(headers.get("content-length", ""))
        except (ApiError, HaoriError) as error:
            reply = error_reply(error) if isinstance(error, ApiError) else noted_reply(scope, error)
            await reply(scope, receive, send)
            return
        scope["haori.caller"] = caller
        if caller is not None and caller.key is not None:
            note_of(scope).key = caller.key.name
        await self._app(scope, self._counted(receive), send)

    def _check_length(self, given: str) -> None:
        if given.isascii() and given.isdigit() and int(given[:20]) > self._max_body_bytes:
            raise ApiError(413, f"The request has {given[:20]} bytes; at most {self._max_body_bytes} are read.")

    def _counted(self, receive: Receive) -> Receive:
        """Count a body without Content-Length while it is received."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                # FastAPI lets this kind of error through while it reads a body.
                raise HTTPException(413, f"The request is too long; at most {self._max_body_bytes} bytes are read.")
            return message

        return counted
