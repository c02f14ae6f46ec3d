"""The outermost layer: every reply has a request id, every request a line in the log, every error the same form."""

import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from haori.server.access_log import AccessLog
from haori.server.errors import ApiError, error_reply
from haori.server.request_note import RequestNote

__all__ = ["ClientGoneError", "Front"]

_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499  # as nginx logs it; nobody is there to read it


class ClientGoneError(Exception):
    """The client closed the connection before it had its reply."""


class Front:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, log: AccessLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its note in `scope["haori.note"]`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = scope["haori.note"] = _note(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = note.id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except ClientGoneError:
            note.status = _CLIENT_GONE
        except Exception as error:  # noqa: BLE001 - the last resort: a reply and a traceback in the log
            self._log.failure(note, error)
            if note.status is None:
                sentence = f"The server failed; its log says why at the request id {note.id}."
                await error_reply(ApiError(500, sentence), scope["path"])(scope, receive, tell)
        finally:
            self._log.write(note)


def _note(scope: Scope) -> RequestNote:
    given = Headers(scope=scope).get("x-request-id", "")
    identity = given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
    client = scope.get("client")
    return RequestNote(identity, scope["method"], scope["path"], client[0] if client else None)
