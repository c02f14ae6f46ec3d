"""What a request to `/v1/responses` may hold. Nothing is kept, so each request brings its whole conversation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from haori.data.tool_prompt import Turn
from haori.server.errors import ApiError
from haori.server.openai.chat_messages import called_turn
from haori.server.openai.request_fields import ChoosingFields, RequestPart
from haori.server.openai.structured import JsonObjectFormat, TextFormat
from haori.server.openai.tools import Function, FunctionName, ToolUse

__all__ = ["ResponseRequest"]

_LOGPROBS = "message.output_text.logprobs"


class ContentPart(RequestPart):
    """A part of a message's content."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "image_url": (), "file_id": (), "file_url": (), "file_data": (), "filename": (), "detail": (),
        "input_audio": (), "refusal": (), "prompt_cache_breakpoint": (),
    }  # fmt: skip

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Any = None
    logprobs: Any = None


class MessageItem(RequestPart):
    """A message."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    id: str | None = None
    status: str | None = None


class CallItem(RequestPart):
    """A call in an earlier answer."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "namespace": (), "caller": (), "async": (), "async_": (), "parsed_arguments": (),
    }  # fmt: skip

    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=1000)
    name: str = Field(min_length=1, max_length=1000)
    arguments: str
    id: str | None = None
    status: str | None = None


class ResultItem(RequestPart):
    """The result of a call."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"namespace": (), "caller": ()}

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=1000)
    output: str | list[ContentPart]
    name: str | None = None
    id: str | None = None
    status: str | None = None


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return {"message": "Message", "function_call": "Call", "function_call_output": "Result"}.get(str(kind), "")


InputItem = Annotated[
    Annotated[MessageItem, Tag("Message")] | Annotated[CallItem, Tag("Call")] | Annotated[ResultItem, Tag("Result")],
    Discriminator(
        _kind, custom_error_type="unsupported_item",
        custom_error_message="It must be a message, a function_call or a function_call_output; no other is supported",
    ),
]  # fmt: skip


class JsonSchemaFormat(RequestPart):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str = Field(max_length=200)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(default=None, description="Taken; answers always fit the schema.")


class TextOptions(RequestPart):
    """What the text of the answer looks like."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(default=None, discriminator="type")


class ResponseTool(Function):
    """A function that the model may call."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "defer_loading": (), "allowed_callers": (["direct"],), "output_schema": (), "async": (),
    }  # fmt: skip

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _only_functions(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") != "function":
            text = "'{field}' is {kind}; only tools of the type 'function' are served."
            kind = repr(given.get("type"))[:80].encode("utf-8", "backslashreplace").decode()
            raise PydanticCustomError("misplaced_field", text, {"name": "type", "field": "{field}", "kind": kind})
        return given


class ResponseFunctionChoice(FunctionName):
    """The one function that must be called."""

    type: Literal["function"]


class ResponseStreamOptions(RequestPart):
    """How a stream is sent."""

    include_obfuscation: bool | None = Field(default=None, description="Taken, without effect.")


class ResponseRequest(ChoosingFields):
    """A response."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "previous_response_id": (), "conversation": (), "background": (), "background_options": (), "prompt": (),
        "context_management": (), "max_tool_calls": (), "reasoning": (), "moderation": (), "image": (),
        "access_programs": (), "prompt_cache_options": (), "truncation": ("disabled",), "modalities": (["text"],),
        "max_tokens": (), "n": (1,), "echo": (), "reasoning_effort": (), "response_format": ({"type": "text"},),
        "messages": (),
    }  # fmt: skip

    input: str | Annotated[list[InputItem], Field(min_length=1)] = Field(
        description="Text of the user, or the conversation, oldest item first."
    )
    instructions: str | None = Field(default=None, description="A system message before the conversation.")
    max_output_tokens: int | None = Field(default=None, ge=1, description="Longest answer in tokens.")
    text: TextOptions | None = Field(default=None, description="Text, any JSON object, or a schema.")
    tools: list[ResponseTool] | None = Field(default=None, max_length=128, description="Functions that may be called.")
    tool_choice: Literal["none", "auto", "required"] | ResponseFunctionChoice | None = Field(
        default=None, description="Whether to call: never, as it comes, certainly, or a certain function."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Whether there may be several calls at once.")
    include: list[str] | None = Field(default=None, description=f"`{_LOGPROBS}`, or nothing.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Report so many likeliest tokens.")
    store: bool | None = Field(default=None, description="Nothing is stored; `true` is refused.")
    stream_options: ResponseStreamOptions | None = Field(default=None, description="Taken, without effect.")

    @model_validator(mode="after")
    def _nothing_is_kept(self) -> "ResponseRequest":
        if self.store:
            text = "'{field}' is not supported by this server, which stores no responses; take it out, or say false."
            raise PydanticCustomError("unsupported_field", text, {"name": "store", "field": "{field}"})
        if wrong := next((name for name in self.include or () if name != _LOGPROBS), None):
            text = "'{field}' cannot have {wrong}: only '" + _LOGPROBS + "' is supported."
            context = {"name": "include", "field": "{field}", "wrong": repr(wrong[:80])}
            raise PydanticCustomError("misplaced_field", text, context)
        return self

    @property
    def tool_use(self) -> ToolUse:
        """Return the tools and how they may be called.

        Raises:
            ApiError: The fields contradict one another.
        """
        return ToolUse.of(self.tools or (), self.tool_choice, several=self.parallel_tool_calls)

    @property
    def wanted_logprobs(self) -> int | None:
        """Return how many likeliest tokens to report, or None for no log-probabilities.

        Raises:
            ApiError: They are wanted of an answer that may be a call.
        """
        if not self.top_logprobs and not self.include:
            return None
        if self.tools:
            raise ApiError(400, "Log-probabilities are not given with 'tools'; ask without one.", param="include")
        return self.top_logprobs or 0

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """Return the schema that the answer must fit; an empty one allows any object."""
        match self.text.format if self.text is not None else None:
            case JsonObjectFormat():
                return {}
            case JsonSchemaFormat() as wanted:
                return wanted.schema_
        return None

    def turns(self) -> list[Turn]:
        """Return the conversation as templates expect it.

        Raises:
            ApiError: Arguments are no JSON object, or a result belongs to no call before it.
        """
        turns: list[dict[str, Any]] = []
        if self.instructions:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*turns, {"role": "user", "content": self.input}]
        names: dict[str, str] = {}
        for index, item in enumerate(self.input):
            match item:
                case MessageItem():
                    role = "system" if item.role == "developer" else item.role
                    _add_message(turns, role, _text(item.content))
                case CallItem():
                    names[item.call_id] = item.name
                    call = called_turn(item.call_id, item.name, item.arguments, f"input[{index}].arguments")
                    _add_call(turns, call)
                case ResultItem():
                    if item.call_id not in names:
                        field = f"input[{index}].call_id"
                        message = f"{field!r} is {item.call_id[:80]!r}, which is the id of no call before it."
                        raise ApiError(400, message, param=field)
                    result = {"tool_call_id": item.call_id, "name": item.name or names[item.call_id]}
                    turns.append({"role": "tool", "content": _text(item.output), **result})
        return list(turns)


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _add_message(turns: list[dict[str, Any]], role: str, text: str) -> None:
    """Add a turn; instructions and the system messages that follow them are one."""
    if role == "system" and len(turns) == 1 and turns[0]["role"] == "system":
        turns[0]["content"] += f"\n\n{text}"
    else:
        turns.append({"role": role, "content": text})


def _add_call(turns: list[dict[str, Any]], call: dict[str, Any]) -> None:
    """Add a call to the assistant's turn that it belongs to."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    turns[-1].setdefault("tool_calls", []).append(call)
