"""`/v1/completions`: text, or token ids, as they are, and what follows them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from haori.serve.request import StreamChunk
from haori.server.answers import Answer, Answers, Question
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.plain_prompts import PlainPrompts
from haori.server.openai.replies import CompletionChoice, CompletionLogprobs, CompletionReply, Usage, usage_of
from haori.server.openai.replying import ERRORS, Heading, choices_of, finish_of, heading, reply
from haori.server.openai.request_fields import misplaced
from haori.server.openai.streaming import DONE
from haori.server.openai.structured import StructuredFields
from haori.server.openai.token_texts import TokenTexts

__all__ = ["CompletionRequest", "router"]

router = APIRouter()

_DEFAULT_TOKENS = 16  # OpenAI's


class CompletionRequest(StructuredFields):
    """A plain completion."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,), "suffix": (), "guided_decoding_backend": (), "guided_whitespace_pattern": (),
        "response_format": ({"type": "text"},), "skip_special_tokens": (True,),
        "tools": (), "max_completion_tokens": (),
    }  # fmt: skip

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="Text or token ids; one or several.")
    max_tokens: int | None = Field(
        default=None, ge=0, description="Longest answer in tokens; 0 with `echo` or `prompt_logprobs` only."
    )
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Report so many likeliest tokens.")
    echo: bool | None = Field(default=None, description="Say the prompt before the answer, with its log-probabilities "
                              "where these are reported.")  # fmt: skip
    add_special_tokens: bool | None = Field(
        default=None, description="Whether the tokenizer puts its own tokens around a text; true by default."
    )
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20, description="Report so many likeliest tokens at "
                                        "each position of the prompt, as vLLM does.")  # fmt: skip

    @model_validator(mode="after")
    def _prompts_alone(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise misplaced("max_tokens", "'{field}' can be 0 only with 'echo' or 'prompt_logprobs'; give 1 or more.")
        if self.prompt_logprobs is not None and self.streams:
            raise misplaced("prompt_logprobs", "'{field}' is not for 'stream': true; take one of them out.")
        return self

    @property
    def scored(self) -> int | None:
        """Return how many likeliest tokens are wanted at each position of the prompt; None if it is not scored."""
        wanted = [self.logprobs if self.echo else None, self.prompt_logprobs]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Return the prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class CompletionForm:
    """Writes replies of plain completions.

    Args:
        head: What replies begin with.
        texts: Reads single tokens.
        asked: The request.
        prompts: Its prompts.
        choices: Answers to each of them.
    """

    named: ClassVar = False
    end: ClassVar = DONE

    def __init__(
        self, head: Heading, texts: TokenTexts, asked: CompletionRequest, prompts: PlainPrompts, choices: int
    ) -> None:
        self._head = head
        self._texts = texts
        self._logprobs = asked.logprobs
        self._prompt_logprobs = asked.prompt_logprobs
        self._usage = asked.wants_usage
        self._prompts = prompts
        self._choices = choices
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the reply with all answers; log-probabilities are made when they are due."""
        choices = [
            CompletionChoice(
                index=index,
                text=self._text(index, answer.text),
                logprobs=self._logprobs_of(index, answer) if self._echoes(index) else None,
                finish_reason=finish_of(answer) or "stop",
                prompt_logprobs=None
                if self._prompt_logprobs is None
                else self._texts.prompt(answer.prompt_logprobs, tops=self._prompt_logprobs),
            )
            for index, answer in enumerate(answers)
        ]
        reply = CompletionReply(**self._head.fields(), choices=choices, usage=usage).model_dump()
        for index, answer in enumerate(answers):
            if self._logprobs is not None and not self._echoes(index):
                reply["choices"][index]["logprobs"] = self._texts.plain_items(answer.logprobs, tops=self._logprobs)
        return reply

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return nothing: text comes first."""
        return []

    def events(self, index: int, chunk: StreamChunk) -> Iterable[dict[str, Any]]:
        """Return the event for a stream chunk."""
        text = self._text(index, chunk.text)
        found = self._logprobs_of(index, chunk)
        logprobs = found.model_dump() if found and found.tokens else None
        if not text and chunk.finish is None and logprobs is None:
            return []
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_of(chunk)}
        event = {"object": "text_completion", **self._head.fields(), "choices": [choice]}
        return [{**event, "usage": None} if self._usage else event]

    def _echoes(self, index: int) -> bool:
        return self._prompts.echoed(index // self._choices) is not None

    def _text(self, index: int, text: str) -> str:
        """Return a part of the answer's text; an echoed prompt stands before the first one."""
        echoed = None if index in self._offsets else self._prompts.echoed(index // self._choices)
        return text if echoed is None else echoed.text + text

    def _logprobs_of(self, index: int, part: Answer | StreamChunk) -> CompletionLogprobs | None:
        """Return the log-probabilities of a part of the answer, if wanted; the prompt's stand before the first ones."""
        echoed = None if index in self._offsets else self._prompts.echoed(index // self._choices)
        offset = self._offsets.setdefault(index, 0 if echoed is None else len(echoed.text))
        if self._logprobs is None:
            return None
        found = self._texts.plain(part.logprobs, tops=self._logprobs, offset=offset)
        self._offsets[index] = offset + sum(map(len, found.tokens))
        if echoed is None:
            return found
        prompt = self._texts.echoed(echoed, part.prompt_logprobs, tops=self._logprobs)
        return CompletionLogprobs(
            tokens=prompt.tokens + found.tokens,
            token_logprobs=prompt.token_logprobs + found.token_logprobs,
            top_logprobs=[*prompt.top_logprobs, *found.top_logprobs]
            if prompt.top_logprobs is not None and found.top_logprobs is not None
            else None,
            text_offset=prompt.text_offset + found.text_offset,
        )

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the error."""
        return [error.body()]

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the event with the token counts, where it was asked for."""
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
    longest = asked.max_tokens
    if longest is None:
        longest = min(_DEFAULT_TOKENS, limits.max_tokens or _DEFAULT_TOKENS)
    sampling = asked.sampling(
        longest=longest,
        limit=limits.max_tokens,
        logprobs=asked.logprobs,
        prompt_logprobs=asked.scored,
        **asked.structure() or {},
    )
    head, choices = heading(request, "cmpl", asked.model), choices_of(request, asked)
    prompts = PlainPrompts(asked.prompts, echo=bool(asked.echo), special=asked.add_special_tokens is not False)
    question = Question(head.id, asked.model, prompts.read, sampling, choices)
    form = CompletionForm(head, TokenTexts(service.backend.engine.tokenizer), asked, prompts, choices)
    return await reply(request, question, form, stream=asked.streams)
