"""The messages of a chat: what each role may say, and in what order."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from haori.data.messages import REASONING
from haori.data.tool_prompt import Turn
from haori.server.errors import ApiError
from haori.server.openai.request_fields import RequestPart, misplaced

__all__ = ["ChatMessage", "TextPart", "called_turn", "turns_of"]


class TextPart(RequestPart):
    """A part of a message's content."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "image_url": (), "input_audio": (), "video_url": (), "file": (), "refusal": (), "prompt_cache_breakpoint": (),
    }  # fmt: skip

    type: Literal["text"]
    text: str


class CalledFunction(RequestPart):
    """The function that was called."""

    name: str = Field(min_length=1, max_length=1000)
    arguments: str = Field(description="JSON of an object.")


class Call(RequestPart):
    """A call in an earlier answer."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"custom": ()}

    id: str = Field(min_length=1, max_length=1000)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestPart):
    """One turn."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "function_call": (), "audio": (), "refusal": (), "annotations": (),
    }  # fmt: skip

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(
        default=None, description="Text, whole or in parts; nothing else is supported. Only calls need none."
    )
    tool_calls: list[Call] | None = Field(default=None, description="Calls that the assistant made.")
    tool_call_id: str | None = Field(default=None, description="The call that a tool's message is the result of.")
    name: str | None = Field(default=None, description="The function, in a tool's message; not for other roles.")
    reasoning_content: str | None = Field(default=None, description="What the assistant thought before it answered.")
    reasoning: str | None = Field(default=None, description="Another name of `reasoning_content`.")
    thinking: str | None = Field(default=None, description="Another name of `reasoning_content`.")

    @model_validator(mode="after")
    def _parts_of_its_role(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise misplaced("content", "'{field}' is missing or None; give text.")
        if self.role == "tool" and not self.tool_call_id:
            raise misplaced("tool_call_id", "'{field}' is missing; give the id of the call that this is the result of.")
        if self.tool_calls and self.role != "assistant":
            raise misplaced("tool_calls", "'{field}' is only for the assistant's messages; take it out.")
        given = [field for field in REASONING if getattr(self, field)]
        if given and self.role != "assistant":
            raise misplaced(given[0], "'{field}' is only for the assistant's messages; take it out.")
        if len({getattr(self, field) for field in given}) > 1:
            raise misplaced(given[1], f"'{{field}}' and {given[0]!r} differ; give one of them.")
        for field in ("tool_call_id", "name"):
            if getattr(self, field) and self.role != "tool":
                raise misplaced(
                    field, "'{field}' is not supported by this server but in a tool's message; take it out."
                )
        return self

    @property
    def thoughts(self) -> str | None:
        """Return what the assistant thought before it answered, by whichever name it was given."""
        return self.reasoning_content or self.reasoning or self.thinking

    @property
    def text(self) -> str:
        """Return the content with its parts joined."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def turns_of(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return the turns as templates expect them.

    Raises:
        ApiError: Arguments are no JSON object, or a result belongs to no call before it.
    """
    turns: list[Turn] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        turn: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role, "content": message.text,
        }  # fmt: skip
        if message.thoughts:
            turn["reasoning_content"] = message.thoughts
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [
                called_turn(call.id, call.function.name, call.function.arguments,
                            f"messages[{index}].tool_calls[{number}].function.arguments")
                for number, call in enumerate(message.tool_calls)
            ]  # fmt: skip
        if message.role == "tool":
            identity = message.tool_call_id or ""
            if identity not in names:
                field = f"messages[{index}].tool_call_id"
                raise ApiError(
                    400, f"{field!r} is {identity[:80]!r}, which is the id of no call before it.", param=field
                )
            turn |= {"tool_call_id": identity, "name": message.name or names[identity]}
        turns.append(turn)
    return turns


def called_turn(identity: str, name: str, arguments: str, path: str) -> dict[str, Any]:
    """Return a call as templates expect it.

    Raises:
        ApiError: The arguments are no JSON object; `path` is where they were given.
    """
    try:
        found = json.loads(arguments)
        json.dumps(found, allow_nan=False)  # raises for NaN, infinity and 1e999, which Python reads
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = f"{path!r} cannot be {arguments[:80]!r}: it must be the JSON of an object."
        raise ApiError(400, message, param=path, code="invalid_value")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": found}}
