"""vLLM's `/tokenize` and `/detokenize`: a text or a conversation as the ids that a model is given, and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from haori.data import PromptFormat
from haori.server.access import caller_of
from haori.server.disconnect import until_disconnect
from haori.server.lifecycle import service_of
from haori.server.openai.chat_messages import ChatMessage, turns_of
from haori.server.openai.plain_prompts import check_ids, text_ids
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart, misplaced
from haori.server.openai.tools import FunctionTool, ToolUse, prompt_of
from haori.server.request_note import note_of

__all__ = ["DetokenizeRequest", "TokenizeRequest", "router"]

router = APIRouter()

_T = TypeVar("_T")


class TokenizeRequest(RequestPart):
    """A text, or a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_generation_prompt": (True,), "continue_final_message": (), "chat_template": (),
        "chat_template_kwargs": (), "mm_processor_kwargs": (),
    }  # fmt: skip

    model: str | None = Field(default=None, min_length=1, max_length=1000, description="As for completions; the base "
                              "by default.")  # fmt: skip
    prompt: str | None = Field(default=None, description="A text, as `/v1/completions` reads it.")
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, description="Or a conversation, as "
                                               "`/v1/chat/completions` reads it.")  # fmt: skip
    tools: list[FunctionTool] | None = Field(default=None, max_length=128, description="Only with `messages`.")
    add_special_tokens: bool | None = Field(
        default=None, description="Whether the tokenizer puts its own tokens around a text; true by default."
    )
    return_token_strs: bool | None = Field(default=None, description="Return the tokens as the tokenizer writes them.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise misplaced("prompt", "Give either '{field}' or 'messages'.")
        if self.messages is None and self.tools:
            raise misplaced("tools", "'{field}' is only for 'messages'; take it out.")
        if self.messages is not None and self.add_special_tokens:
            text = "'{field}' is only for 'prompt': the chat template writes what stands around messages; take it out."
            raise misplaced("add_special_tokens", text)
        return self


class TokenizeReply(BaseModel):
    """The ids, and how many a prompt and its answer may have."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestPart):
    """Token ids."""

    model: str | None = Field(default=None, min_length=1, max_length=1000, description="The base by default.")
    tokens: list[int] = Field(description="Token ids.")


class DetokenizeReply(BaseModel):
    """The text."""

    prompt: str


@router.post("/tokenize", responses=ERRORS)
async def tokenize(asked: TokenizeRequest, request: Request) -> TokenizeReply:
    """Return the token ids of a text or a conversation."""
    turns = turns_of(asked.messages or ())
    use = ToolUse.of([tool.function for tool in asked.tools or ()], None, several=None)

    def read(speech: PromptFormat) -> tuple[Sequence[int], list[str] | None]:
        if asked.prompt is None:
            ids: Sequence[int] = prompt_of(speech, turns, use)
        else:
            ids = text_ids(speech.tokenizer, asked.prompt, special=asked.add_special_tokens is not False)
        written = speech.tokenizer.convert_ids_to_tokens(list(ids)) if asked.return_token_strs else None
        return ids, written

    ids, written = await _prepared(request, asked.model, read)
    longest = service_of(request).backend.engine.context_length
    return TokenizeReply(count=len(ids), max_model_len=longest, tokens=list(ids), token_strs=written)


@router.post("/detokenize", responses=ERRORS)
async def detokenize(asked: DetokenizeRequest, request: Request) -> DetokenizeReply:
    """Return the text of token ids."""

    def write(speech: PromptFormat) -> str:
        check_ids(speech.tokenizer, asked.tokens, "tokens")
        return str(speech.tokenizer.decode(asked.tokens, clean_up_tokenization_spaces=False))

    return DetokenizeReply(prompt=await _prepared(request, asked.model, write))


async def _prepared(request: Request, model: str | None, job: Callable[[PromptFormat], _T]) -> _T:
    """Do a job on a preparing thread, given how a model is spoken to.

    Raises:
        ApiError: The caller may not use the model.
        HaoriError: There is no such model, too many wait, or the job raises it.
    """
    service, caller, note = service_of(request), caller_of(request), note_of(request.scope)
    engine, directory = service.backend.engine, service.backend.directory
    name = engine.base.name if model is None else model
    note.model = name
    caller.check(name, engine.base.name)

    def run() -> _T:
        resolved = caller.resolve(directory, name, engine.base.name)
        note.serves, note.adapters = resolved.label, tuple(identity for identity, _ in resolved.mix)
        with service.preparation.tokenizing:
            return job(directory.prompt_format(engine.tokenizer, resolved.mix))

    async def done() -> _T:
        return await service.preparation.run(caller.owner, run)

    return await until_disconnect(done(), request.receive)
