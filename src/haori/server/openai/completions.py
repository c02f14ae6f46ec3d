"""`/v1/completions`: text, or token ids, as they are, and what follows them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from haori.data import PromptFormat
from haori.serve.request import Delta
from haori.server.answers import Answer, Answers, Question
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.asked import SamplingFields
from haori.server.openai.replies import CompletionChoice, CompletionReply, Usage, usage_of
from haori.server.openai.replying import ERRORS, Heading, choices_of, finish_of, heading, reply
from haori.server.openai.streaming import DONE
from haori.server.openai.token_texts import TokenTexts

__all__ = ["CompletionRequest", "router"]

router = APIRouter()

_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionRequest(SamplingFields):
    """A plain completion."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,), "echo": (), "suffix": (), "guided_json": (), "structured_outputs": (), "prompt_logprobs": (),
        "response_format": ({"type": "text"},), "skip_special_tokens": (True,), "add_special_tokens": (True,),
        "tools": (), "max_completion_tokens": (),
    }  # fmt: skip

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Text or token ids; one or several.")
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Report so many likeliest tokens.")

    def ids(self, speech: PromptFormat) -> Sequence[Sequence[int]]:
        """Return the token ids of each prompt.

        Raises:
            ApiError: A prompt is empty, or holds an id that is not the tokenizer's.
        """
        tokenizer = speech.tokenizer
        found = [
            list(tokenizer(prompt, verbose=False)["input_ids"]) if isinstance(prompt, str) else prompt
            for prompt in self.prompts
        ]
        if not all(found):
            raise ApiError(400, "A prompt is empty; give at least one token.", param="prompt", code="invalid_value")
        size = len(tokenizer)
        if wrong := next((token for prompt in found for token in prompt if not 0 <= token < size), None):
            message = f"The prompt has the token id {wrong}; ids of this base are 0 to {size - 1}."
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return found

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Return the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class CompletionForm:
    """Writes replies of plain completions."""

    named: ClassVar = False
    end: ClassVar = DONE

    def __init__(self, head: Heading, texts: TokenTexts, *, logprobs: int | None, usage: bool) -> None:
        self._head = head
        self._texts = texts
        self._logprobs = logprobs
        self._usage = usage
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """Return the reply with all answers."""
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=None
                if self._logprobs is None
                else self._texts.plain(answer.logprobs, tops=self._logprobs, offset=0),
                finish_reason=finish_of(answer) or "stop",
            )
            for index, answer in enumerate(answers)
        ]
        return CompletionReply(**self._head.fields(), choices=choices, usage=usage)

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return nothing: text comes first."""
        return []

    def piece(self, index: int, delta: Delta) -> Iterable[dict[str, Any]]:
        """Return the chunk of a piece."""
        logprobs = None
        if delta.logprobs and self._logprobs is not None:
            offset = self._offsets.get(index, 0)
            found = self._texts.plain(delta.logprobs, tops=self._logprobs, offset=offset)
            self._offsets[index] = offset + sum(map(len, found.tokens))
            logprobs = found.model_dump()
        if not delta.text and delta.finish is None and logprobs is None:
            return []
        choice = {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish_of(delta)}
        chunk = {"object": "text_completion", **self._head.fields(), "choices": [choice]}
        return [{**chunk, "usage": None} if self._usage else chunk]

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the error."""
        return [error.body()]

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the chunk with the token counts, where it was asked for."""
        if not self._usage:
            return []
        head = {"object": "text_completion", **self._head.fields()}
        return [{**head, "choices": [], "usage": usage_of(answers).model_dump()}]


@router.post(
    "/v1/completions",
    responses={
        **ERRORS,
        200: {"model": CompletionReply, "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    },
)
async def completions(asked: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts."""
    service = service_of(request)
    limits = service.settings
    if not 0 < len(asked.prompts) <= limits.max_prompts:
        message = f"{len(asked.prompts)} prompts were given; one request has 1 to {limits.max_prompts}."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    longest = asked.max_tokens or min(_DEFAULT_TOKENS, limits.max_tokens or _DEFAULT_TOKENS)
    sampling = asked.sampling(longest=longest, limit=limits.max_tokens, logprobs=asked.logprobs)
    head = heading(request, "cmpl", asked.model)
    question = Question(head.id, asked.model, asked.ids, sampling, choices_of(request, asked))
    texts = TokenTexts(service.backend.engine.tokenizer)
    form = CompletionForm(head, texts, logprobs=asked.logprobs, usage=asked.wants_usage)
    return await reply(request, question, form, stream=asked.streams)
