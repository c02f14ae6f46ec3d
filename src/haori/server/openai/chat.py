"""`/v1/chat/completions`: conversations, rendered with the base's own chat template."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from haori.data import Message, render_prompt
from haori.serve.request import Delta
from haori.server.answers import Answer, Answers, Question
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.asked import Asked, SamplingFields
from haori.server.openai.replies import ChatChoice, ChatMessageReply, ChatReply, Usage, usage_of
from haori.server.openai.replying import ERRORS, Heading, choices_of, finish_of, heading, reply
from haori.server.openai.token_texts import TokenTexts

__all__ = ["ChatRequest", "router"]

router = APIRouter()


class TextPart(Asked):
    """A piece of a message."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "image_url": (), "input_audio": (), "video_url": (), "file": (), "refusal": (), "prompt_cache_breakpoint": (),
    }  # fmt: skip

    type: Literal["text"]
    text: str


class ChatMessage(Asked):
    """One turn."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "name": (), "tool_calls": (), "tool_call_id": (), "function_call": (), "audio": (), "refusal": (),
        "annotations": (), "reasoning_content": (), "reasoning": (),
    }  # fmt: skip

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="Text, whole or in parts; nothing else is supported.")

    def plain(self) -> Message:
        """Return the turn with its parts joined."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class TextFormat(Asked):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Asked):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Asked):
    """A JSON schema."""

    name: str = Field(max_length=200)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="Taken; answers always fit the schema.")


class JsonSchemaFormat(Asked):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(SamplingFields):
    """A chat completion."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (), "function_call": ("auto",), "functions": (), "modalities": (["text"],), "moderation": (),
        "prediction": (), "prompt_cache_options": (), "reasoning_effort": (), "tool_choice": ("auto",), "tools": (),
        "verbosity": (), "web_search_options": (), "best_of": (1,), "echo": (), "chat_template": (),
        "chat_template_kwargs": (), "continue_final_message": (), "add_generation_prompt": (True,), "guided_json": (),
        "structured_outputs": (), "prompt_logprobs": (), "skip_special_tokens": (True,),
    }  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation, oldest turn first.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of `max_tokens`.")
    logprobs: bool | None = Field(default=None, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="And of so many likeliest ones.")
    response_format: ResponseFormat | None = Field(default=None, description="Text, any JSON object, or a schema.")
    parallel_tool_calls: bool | None = Field(default=None, description="Taken, without effect: there are no tools.")

    @property
    def longest(self) -> int | None:
        """Return the longest answer asked for.

        Raises:
            ApiError: Both names are used, and differ.
        """
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ApiError(400, "'max_tokens' and 'max_completion_tokens' differ; give one.", param="max_tokens")
        return old if new is None else new

    @property
    def wanted_logprobs(self) -> int | None:
        """Return how many likeliest tokens to report, or None for no log-probabilities.

        Raises:
            ApiError: Likeliest tokens are wanted without log-probabilities.
        """
        if not self.logprobs:
            if self.top_logprobs:
                raise ApiError(400, "'top_logprobs' is only for 'logprobs': true.", param="top_logprobs")
            return None
        return self.top_logprobs or 0

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """Return the schema that the answer must fit; an empty one allows any object."""
        match self.response_format:
            case JsonObjectFormat():
                return {}
            case JsonSchemaFormat(json_schema=named):
                return named.schema_
        return None


class ChatForm:
    """Writes chat replies."""

    def __init__(self, head: Heading, texts: TokenTexts, *, logprobs: bool, usage: bool) -> None:
        self._head = head
        self._texts = texts
        self._logprobs = logprobs
        self._usage = usage

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """Return the reply with all answers."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessageReply(content=answer.text),
                logprobs=self._texts.chat(answer.logprobs) if self._logprobs else None,
                finish_reason=finish_of(answer) or "stop",
            )
            for index, answer in enumerate(answers)
        ]
        return ChatReply(**self._head.fields(), choices=choices, usage=usage)

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return a chunk with the role for each answer."""
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a piece."""
        logprobs = self._texts.chat(delta.logprobs).model_dump() if delta.logprobs else None
        if not delta.text and delta.finish is None and logprobs is None:
            return None
        content = {"content": delta.text} if delta.text or logprobs else {}
        return self._chunk(index, content, finish=finish_of(delta), logprobs=logprobs)

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the chunk with the token counts, where it was asked for."""
        if not self._usage:
            return []
        head = {"object": "chat.completion.chunk", **self._head.fields()}
        return [{**head, "choices": [], "usage": usage_of(answers).model_dump()}]

    def _chunk(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {"object": "chat.completion.chunk", **self._head.fields(), "choices": [choice]}
        return {**chunk, "usage": None} if self._usage else chunk


@router.post(
    "/v1/chat/completions",
    responses={**ERRORS, 200: {"model": ChatReply, "content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def chat_completions(asked: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    sampling = asked.sampling(
        longest=asked.longest,
        limit=service.settings.max_tokens,
        logprobs=asked.wanted_logprobs,
        json_schema=asked.schema_wanted,
    )
    messages = [message.plain() for message in asked.messages]
    head = heading(request, "chatcmpl", asked.model)
    question = Question(
        head.id, asked.model, lambda tokenizer: [render_prompt(tokenizer, messages)], sampling,
        choices_of(request, asked),
    )  # fmt: skip
    texts = TokenTexts(service.backend.engine.tokenizer)
    form = ChatForm(head, texts, logprobs=sampling.logprobs is not None, usage=asked.wants_usage)
    return await reply(request, question, form, stream=asked.streams)
