"""What OpenAI's routes reply, as the official clients read it."""

from typing import Literal

from pydantic import BaseModel, Field

from haori.server.answers import Answers

__all__ = [
    "CalledFunctionReply",
    "ChatChoice",
    "ChatLogprobs",
    "ChatMessageReply",
    "ChatReply",
    "ChatTokenLogprob",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionReply",
    "EmbeddingItem",
    "EmbeddingReply",
    "EmbeddingUsage",
    "ModelCard",
    "ModelList",
    "PromptLogprob",
    "ToolCallReply",
    "TopLogprob",
    "Usage",
    "usage_of",
]

Ending = Literal["stop", "length"]
ChatEnding = Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    """What is known of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens taken from the prefix cache.")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token, its bytes and its log-probability (nats)."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest ones at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunctionReply(BaseModel):
    """The function that is called."""

    name: str
    arguments: str = Field(description="JSON of an object.")


class ToolCallReply(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunctionReply


class ChatMessageReply(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Text; null where there are only calls.")
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = Field(default=None, exclude_if=lambda calls: calls is None)


class ChatChoice(BaseModel):
    """One answer, and why it ended."""

    index: int
    message: ChatMessageReply
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnding


class ChatReply(BaseModel):
    """The reply to a chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As asked for.")
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str = Field(description="Changes with the base.")


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older format: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of a prompt.")
    top_logprobs: list[dict[str, float] | None] | None = Field(
        description="The likeliest tokens at each position, and the one that stands there."
    )
    text_offset: list[int] = Field(description="The character at which each begins.")


class PromptLogprob(BaseModel):
    """How likely a token is at a position of a prompt, in vLLM's form."""

    logprob: float
    rank: int | None = Field(description="Its rank among all tokens, 1 for the likeliest.")
    decoded_token: str


class CompletionChoice(BaseModel):
    """One answer, and why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Ending
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, exclude_if=lambda found: found is None, description="By token id; null for the first token."
    )


class CompletionReply(BaseModel):
    """The reply to a plain completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ModelCard(BaseModel):
    """A base or an adapter, in vLLM's form."""

    id: str = Field(description="What to put into `model`.")
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["haori"] = "haori"
    root: str | None = Field(description="Folder of an adapter; only an admin sees it.")
    parent: str | None = Field(description="The base of an adapter.")
    permission: list[str] = Field(default_factory=list)
    labels: list[str] | None = Field(
        default=None, exclude_if=lambda found: found is None,
        description="Of a classifier that is asked for by its name: the labels in the order of `probs`.",
    )  # fmt: skip


class ModelList(BaseModel):
    """Everything the caller may use."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class EmbeddingItem(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian 32-bit floats.")


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(BaseModel):
    """The reply to an embedding request."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


def usage_of(answers: Answers) -> Usage:
    """Return the token counts of answers, as far as they have come."""
    return Usage(
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=answers.generated_tokens,
        total_tokens=answers.prompt_tokens + answers.generated_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=min(answers.cached_tokens, answers.prompt_tokens)),
    )
