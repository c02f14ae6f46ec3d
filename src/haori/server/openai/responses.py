"""`/v1/responses`: OpenAI's newer form of a chat, without its memory: nothing is stored."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from haori.serve.request import Sampling, StreamChunk
from haori.server.answers import Answer, Answers, Question
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.replies import Usage, usage_of
from haori.server.openai.replying import ERRORS, Heading, finish_of, heading, reply
from haori.server.openai.response_items import ResponseItems
from haori.server.openai.response_replies import (
    Incomplete,
    InputDetails,
    ResponseError,
    ResponseReply,
    ResponseUsage,
)
from haori.server.openai.response_request import ResponseRequest
from haori.server.openai.token_texts import TokenTexts
from haori.server.openai.tools import CallPlan, prompt_of
from haori.server.tools import CallEvent, CallReader, TextFound

__all__ = ["router"]

router = APIRouter()


class ResponseForm:
    """Writes a response.

    Args:
        head: What replies begin with.
        asked: The request, parts of which are said again.
        sampling: How tokens are chosen.
        texts: Reads single tokens.
        plan: The tools; None without.
    """

    named: ClassVar = True
    end: ClassVar = b""

    def __init__(
        self, head: Heading, asked: ResponseRequest, sampling: Sampling, texts: TokenTexts, plan: CallPlan | None
    ) -> None:
        self._head = head
        self._asked = asked
        self._sampling = sampling
        self._texts = texts
        self._plan = plan
        self._finish: str | None = None
        self._sent = 0

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the response; log-probabilities are made when they are due."""
        [answer] = answers
        self.events(0, StreamChunk(answer.text, tuple(answer.tokens), (), answer.finish))
        index = self._items.first_message() if answer.logprobs else None
        self._items.close(self._status)
        reply = self._reply(self._status, usage=usage).model_dump()
        if index is not None:
            reply["output"][index]["content"][0]["logprobs"] = self._texts.chat_items(answer.logprobs)
        return reply

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return the events before any text."""
        response = self._reply("in_progress").model_dump()
        return self._numbered(
            {"type": kind, "response": response} for kind in ("response.created", "response.in_progress")
        )

    def events(self, index: int, chunk: StreamChunk) -> Iterable[dict[str, Any]]:
        """Return the events for a stream chunk."""
        self._finish = finish_of(chunk)
        logprobs = self._texts.chat(chunk.logprobs).model_dump()["content"] if chunk.logprobs else []
        return self._numbered(self._items.take(self._found(chunk), logprobs))

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the events after the last chunk."""
        events = self._items.close(self._status)
        response = self._reply(self._status, usage=usage_of(answers)).model_dump()
        return self._numbered([*events, {"type": f"response.{self._status}", "response": response}])

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the event that says that the answer went wrong."""
        said = ResponseError(code="invalid_prompt" if error.status < 500 else "server_error", message=error.message)
        response = self._reply("failed").model_copy(update={"error": said}).model_dump()
        return self._numbered([{"type": "response.failed", "response": response}])

    @cached_property
    def _reader(self) -> CallReader | None:
        """Return what reads calls; how they are written is known once the request has begun."""
        return None if self._plan is None else self._plan.reader()

    @cached_property
    def _items(self) -> ResponseItems:
        return ResponseItems(short_ids=self._plan is not None and self._plan.form.short_ids)

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _found(self, chunk: StreamChunk) -> list[CallEvent]:
        if self._reader is None:
            return [TextFound(chunk.text)] if chunk.text else []
        return [*self._reader.push(chunk.text), *(self._reader.close() if chunk.finish is not None else [])]

    def _numbered(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return events with their sequence numbers."""
        numbered = [{**event, "sequence_number": self._sent + number} for number, event in enumerate(events)]
        self._sent += len(numbered)
        return numbered

    def _reply(self, status: str, usage: Usage | None = None) -> ResponseReply:
        asked = self._asked
        choice = asked.tool_choice or "auto"
        wanted = asked.text.format if asked.text is not None else None
        return ResponseReply.model_validate({
            "id": self._head.id, "created_at": self._head.created, "model": self._head.model, "status": status,
            "incomplete_details": Incomplete() if status == "incomplete" else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens,
            "output": self._items.items, "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "temperature": self._sampling.temperature, "top_p": self._sampling.top_p, "metadata": asked.metadata,
            "text": {"format": {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "usage": None if usage is None else _usage(usage),
        })  # fmt: skip


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
    )  # fmt: skip


@router.post(
    "/v1/responses",
    responses={
        **ERRORS,
        200: {"model": ResponseReply, "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    },
)
async def responses(asked: ResponseRequest, request: Request) -> Response:
    """Answer a conversation, as OpenAI's newer route does."""
    service = service_of(request)
    use, turns = asked.tool_use, asked.turns()
    plan = CallPlan(use, asked.schema_wanted) if use.functions else None
    sampling = asked.sampling(
        longest=asked.max_output_tokens, limit=service.settings.max_tokens, field="max_output_tokens",
        logprobs=asked.wanted_logprobs, json_schema=asked.schema_wanted if plan is None else None,
    )  # fmt: skip
    head = heading(request, "resp", asked.model)
    question = Question(
        head.id, asked.model, lambda speech: [prompt_of(speech, turns, use)], sampling, 1,
        *(() if plan is None else (plan.constraint, plan.compiles)),
    )  # fmt: skip
    form = ResponseForm(head, asked, sampling, TokenTexts(service.backend.engine.tokenizer), plan)
    return await reply(request, question, form, stream=asked.streams)
