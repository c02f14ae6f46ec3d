"""`/v1/chat/completions`: conversations, rendered with the base's own chat template."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from haori.server.answers import Question
from haori.server.errors import ApiError
from haori.server.lifecycle import service_of
from haori.server.openai.chat_form import ChatForm
from haori.server.openai.chat_messages import ChatMessage, turns_of
from haori.server.openai.replies import ChatReply
from haori.server.openai.replying import ERRORS, choices_of, heading, reply
from haori.server.openai.request_fields import RequestPart
from haori.server.openai.structured import JsonObjectFormat, StructuredFields, TextFormat
from haori.server.openai.token_texts import TokenTexts
from haori.server.openai.tools import CallPlan, FunctionChoice, FunctionTool, ToolUse, prompt_of

__all__ = ["ChatRequest", "router"]

router = APIRouter()


class NamedSchema(RequestPart):
    """A JSON schema."""

    name: str = Field(max_length=200)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="Taken; answers always fit the schema.")


class JsonSchemaFormat(RequestPart):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(StructuredFields):
    """A chat completion."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (), "function_call": ("auto",), "functions": (), "modalities": (["text"],), "moderation": (),
        "prediction": (), "prompt_cache_options": (), "reasoning_effort": (),
        "verbosity": (), "web_search_options": (), "best_of": (1,), "echo": (), "chat_template": (),
        "chat_template_kwargs": (), "continue_final_message": (), "add_generation_prompt": (True,),
        "guided_decoding_backend": (), "guided_whitespace_pattern": (), "prompt_logprobs": (),
        "skip_special_tokens": (True,),
    }  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation, oldest turn first.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of `max_tokens`.")
    logprobs: bool | None = Field(default=None, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="And of so many likeliest ones.")
    response_format: ResponseFormat | None = Field(default=None, description="Text, any JSON object, or a schema.")
    tools: list[FunctionTool] | None = Field(default=None, max_length=128, description="Functions that may be called.")
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = Field(
        default=None, description="Whether to call: never, as it comes, certainly, or a certain function."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Whether there may be several calls at once.")

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
    def tool_use(self) -> ToolUse:
        """Return the tools and how they may be called.

        Raises:
            ApiError: The fields contradict one another.
        """
        functions = [tool.function for tool in self.tools or ()]
        return ToolUse.of(functions, self.tool_choice, several=self.parallel_tool_calls)

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


@router.post(
    "/v1/chat/completions",
    responses={**ERRORS, 200: {"model": ChatReply, "content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def chat_completions(asked: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    use, turns = asked.tool_use, turns_of(asked.messages)
    plan = CallPlan(use, asked.schema_wanted) if use.functions else None
    others = {"response_format": asked.schema_wanted is not None, "tools": plan is not None}
    kept = asked.structure(*(name for name, given in others.items() if given))
    if kept is None and plan is None:
        kept = {"json_schema": asked.schema_wanted}
    sampling = asked.sampling(
        longest=asked.longest, limit=service.settings.max_tokens, logprobs=asked.wanted_logprobs, **(kept or {})
    )
    head = heading(request, "chatcmpl", asked.model)
    question = Question(
        head.id, asked.model, lambda speech: [prompt_of(speech, turns, use)], sampling, choices_of(request, asked),
        *(() if plan is None else (plan.constraint, plan.compiles)),
    )  # fmt: skip
    form = ChatForm(
        head, TokenTexts(service.backend.engine.tokenizer), plan, logprobs=sampling.logprobs is not None,
        usage=asked.wants_usage,
    )  # fmt: skip
    return await reply(request, question, form, stream=asked.streams)
