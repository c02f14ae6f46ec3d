"""Answers a question: submits it, and replies whole or as a stream."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from haori.serve.request import StreamChunk
from haori.server.access import caller_of
from haori.server.answers import Answer, Answers, Question
from haori.server.disconnect import until_disconnect
from haori.server.errors import ApiError, ErrorReply
from haori.server.lifecycle import service_of
from haori.server.openai.replies import Usage, usage_of
from haori.server.openai.request_fields import SamplingFields
from haori.server.openai.streaming import EventForm, EventStream
from haori.server.openai.whole_reply import WholeReply
from haori.server.request_note import note_of

__all__ = ["ERRORS", "Heading", "ReplyForm", "choices_of", "finish_of", "heading", "reply"]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in {
        400: "The request cannot be used.",
        401: "No key, or not a valid one.",
        403: "The key may not do this.",
        404: "There is no such model.",
        413: "The request is too large.",
        429: "Too many requests wait; Retry-After says when to come again.",
        500: "The server failed.",
        503: "The server is loading, or about to end.",
    }.items()
}
"""Error replies, for the OpenAPI document."""


class ReplyForm(EventForm, Protocol):
    """How a route writes its reply: whole, or as a stream."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the reply with all answers; an iterator in it stands for the list of its items."""


@dataclass(frozen=True)
class Heading:
    """What every reply and chunk begins with."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """Return the fields of a reply."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def heading(request: Request, prefix: str, model: str) -> Heading:
    """Return the heading of a new reply; its id begins with `prefix`."""
    fingerprint = service_of(request).base.id
    return Heading(f"{prefix}-{secrets.token_hex(16)}", model, f"fp_{fingerprint}")


def choices_of(request: Request, asked: SamplingFields) -> int:
    """Return how many answers each prompt gets.

    Raises:
        ApiError: More than the limit.
    """
    limit = service_of(request).settings.max_choices
    choices = asked.n or 1
    if choices > limit:
        raise ApiError(400, f"'n' cannot be {choices}: at most {limit} are allowed.", param="n", code="invalid_value")
    return choices


def finish_of(ended: StreamChunk | Answer) -> Literal["stop", "length"] | None:
    """Return why an answer ended, as clients know it; other endings are errors by now."""
    return ended.finish if ended.finish in {"stop", "length"} else None


async def reply(request: Request, question: Question, form: ReplyForm, *, stream: bool) -> Response:
    """Answer a question: as a stream, or whole."""
    service = service_of(request)
    if not service.backend.writes_text:
        message = f"The base {service.base.name!r} is an encoder and writes no text; ask /v1/embeddings or /classify."
        raise ApiError(400, message, param="model", code="text_not_served")
    answers = Answers(service, service.backend, question, note_of(request.scope))
    try:
        await until_disconnect(answers.begin(caller_of(request)), request.receive)
        if stream:
            return EventStream(answers, form)
        found = await until_disconnect(answers.whole(), request.receive)
    except BaseException:
        answers.close()
        raise
    content = form.whole(found, usage_of(answers))
    return JSONResponse(content) if question.sampling.logprobs is None else WholeReply(answers, content)
