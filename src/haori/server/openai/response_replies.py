"""What `/v1/responses` replies, as the clients' own types have it."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from haori.server.openai.replies import ChatTokenLogprob

__all__ = ["ResponseReply", "ResponseUsage"]


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str]
    logprobs: list[ChatTokenLogprob]


class OutputMessage(BaseModel):
    """A message of the model."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str = Field(description="What its result is sent with.")
    name: str
    arguments: str = Field(description="JSON of an object.")
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    """What is known of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens taken from the prefix cache.")
    cache_write_tokens: Literal[0] = 0


class OutputDetails(BaseModel):
    """What is known of the answer's tokens."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseError(BaseModel):
    """Why an answer failed."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class Incomplete(BaseModel):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseReply(BaseModel):
    """A response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int = Field(description="Seconds since 1970.")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str = Field(description="As asked for.")
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: Any = None
