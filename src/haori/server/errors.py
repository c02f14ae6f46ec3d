"""Every error as the OpenAI clients expect it: a status and `{"error": {"message", "type", "param", "code"}}`."""

import re
import reprlib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from haori.core.errors import (
    HaoriError,
    InputError,
    LibraryDamagedError,
    LibraryError,
    MissingExtraError,
    OverloadedError,
    UnavailableError,
)
from haori.jobs.database.connection import DatabaseError, in_full
from haori.jobs.fine_tuning.trainable import NotTrainableError
from haori.jobs.missing import MissingError
from haori.jobs.sessions.gone import GoneError
from haori.server.request_note import note_of

__all__ = [
    "ApiError",
    "ErrorReply",
    "api_error_of",
    "describe_problem",
    "error_reply",
    "handle_errors",
    "noted_reply",
    "without_folders",
]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_WEB_UI = "/sdapi/"
_TRAINING_API = "/api/v1/"
_SENTENCES = {
    400: "The body cannot be read as JSON.",
    404: "There is nothing at this address; /openapi.json says what there is, and /v1/models what can be asked for.",
    405: "This address does not answer this method.",
}
_UNION_TAGS = frozenset({"str", "int", "float", "bool", "dict", "list"})
_FIELD = re.compile(r"[a-z_][a-zA-Z0-9_]*")  # classes among a union's alternatives begin with a capital
# An absolute path in quotation marks, and its last part.
_QUOTED_PATH = re.compile(
    r"""(?P<mark>['"])(?:/|[A-Za-z]:[/\\])(?:(?!(?P=mark)).)*?(?P<name>(?:(?!(?P=mark))[^/\\\n])+)[/\\]*(?P=mark)"""
)
_NO_OBJECT = frozenset({"missing", "model_type", "model_attributes_type", "dict_type"})


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="A sentence: what was given, what is allowed, what to do.")
    type: str = Field(description="Kind of error.")
    param: str | None = Field(description="The field of the request that is to blame.")
    code: str | None = Field(description="The error, for programs.")


class ErrorReply(BaseModel):
    """The body of every reply that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """An error reply: status, sentence, and what programs look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _encodable(message)
        self.code = code
        self.param = None if param is None else _encodable(param)
        self.retry_after_s = retry_after_s

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the reply's body, in the shape of the web UI or the training API at their addresses."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        if path.startswith(_WEB_UI):
            return {
                "error": self.code or kind,
                "detail": self.message,
                "body": self.param or "",
                "errors": self.message,
            }
        if path.startswith(_TRAINING_API):
            return {"detail": self.message, "code": self.code or kind}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def without_folders(sentence: str) -> str:
    """Return a sentence with every quoted path cut to its last part: where files lie is not told."""
    return _QUOTED_PATH.sub(r"\g<mark>\g<name>\g<mark>", sentence)


def api_error_of(error: HaoriError) -> ApiError:
    """Return the reply to an error of the project's tree."""
    sentence = without_folders(str(error))
    if isinstance(error, OverloadedError):
        return ApiError(429, sentence, code="server_overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, UnavailableError):
        return ApiError(503, sentence, code="engine_unavailable", retry_after_s=1.0)
    if isinstance(error, DatabaseError) and error.away:
        return ApiError(503, sentence, code="database_unavailable", retry_after_s=1.0)
    if isinstance(error, LibraryDamagedError):
        return ApiError(500, sentence, code="library_damaged")
    if isinstance(error, LibraryError):
        return ApiError(404, sentence, code="model_not_found", param="model")
    if isinstance(error, MissingError):
        return ApiError(404, sentence, code="not_found")
    if isinstance(error, GoneError):
        return ApiError(410, sentence, code="gone")
    if isinstance(error, NotTrainableError):
        return ApiError(400, sentence, code="model_not_available", param="model")
    if isinstance(error, InputError | MissingExtraError):
        return ApiError(400, sentence)
    return ApiError(500, sentence)


def error_reply(error: ApiError, path: str = "") -> JSONResponse:
    """Return the HTTP reply to a request at a path."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(path), status_code=error.status, headers=headers)


def noted_reply(scope: MutableMapping[str, Any], error: HaoriError) -> JSONResponse:
    """Return the HTTP reply to an error of the project's tree; what the server is to blame for is logged whole."""
    reply = api_error_of(error)
    if reply.status >= 500 or reply.message != str(error):
        note_of(scope).error = in_full(error)
    return error_reply(reply, scope["path"])


def handle_errors(app: FastAPI) -> None:
    """Give every error of an app the one shape."""

    async def api(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_reply(error, request.url.path)

    async def haori(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HaoriError)
        return noted_reply(request.scope, error)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        reply = error_reply(ApiError(error.status_code, _http_sentence(error)), request.url.path)
        reply.headers.update(error.headers or {})
        return reply

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        message, param, code = describe_problem(error.errors(), error.body)
        return error_reply(ApiError(400, message, param=param, code=code), request.url.path)

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(HaoriError, haori)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def describe_problem(problems: Sequence[Mapping[str, Any]], body: Any = None) -> tuple[str, str | None, str | None]:
    """Return the sentence, the field and the code of what pydantic found wrong with a request.

    Args:
        problems: As pydantic lists them.
        body: The request's JSON, where there is one.
    """
    # Of a union's alternatives the one that fits best is the one that failed deepest.
    problem = max(problems, key=lambda found: len(found["loc"]))
    context = problem.get("ctx") or {}
    parts = problem["loc"][1:]
    if isinstance(body, dict):
        parts = _in_body(parts, body, lacks_last=problem["type"] == "missing")
    path = _field_path(parts)
    if problem["type"] == "json_invalid":
        return f"The body is not JSON: {context.get('error', 'it cannot be read')}.", None, None
    if problem["type"] in {"unknown_field", "unsupported_field", "invalid_text", "misplaced_field"}:
        name = ".".join(filter(None, (path, str(context["name"]))))
        return str(problem["msg"]).replace("{field}", name), name, problem["type"]
    if path is None and problem["type"] in _NO_OBJECT:
        return "The body must be a JSON object, sent with the content type application/json.", None, None
    if path is None:
        return (
            f"The request cannot be used: {str(problem['msg']).removeprefix('Value error, ')}.",
            None,
            "invalid_value",
        )
    if problem["type"] == "missing":
        return f"{path!r} is missing; give it.", path, "missing_field"
    what = str(problem["msg"])
    given = reprlib.repr(problem.get("input"))
    return f"{path!r} cannot be {given}: {what[:1].lower()}{what[1:]}.", path, "invalid_value"


def _field_path(parts: Sequence[str | int]) -> str | None:
    """Return the path of a field, such as `messages[0].content`; the tags of unions' alternatives are left out."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_TAGS:
            path += f".{part}" if path else part
    return path or None


def _in_body(parts: Sequence[str | int], body: Any, *, lacks_last: bool) -> list[str | int]:
    """Return the parts of a path that the client's JSON has; pydantic also puts alternatives' tags between them.

    Args:
        parts: All of them.
        body: The JSON.
        lacks_last: Whether the last is a field that is missing there.
    """
    kept: list[str | int] = []
    held: Any = body
    for part in parts:
        inside = part in held if isinstance(held, dict) else isinstance(held, list) and part in range(len(held))
        if inside:
            held = held[part]
            kept.append(part)
    return [*kept, parts[-1]] if lacks_last else kept


def _encodable(text: str) -> str:
    """Return text that can be sent: JSON may hold halves of characters, UTF-8 may not."""
    return text.encode("utf-8", "backslashreplace").decode()


def _http_sentence(error: HTTPException) -> str:
    return _SENTENCES.get(error.status_code, str(error.detail))
