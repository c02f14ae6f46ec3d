"""How replies to chats are written: whole, or as chunks, with the calls of tools among them."""

import secrets
import string
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from haori.serve.request import StreamChunk
from haori.server.answers import Answer, Answers
from haori.server.errors import ApiError
from haori.server.openai.replies import (
    CalledFunctionReply,
    ChatChoice,
    ChatEnding,
    ChatMessageReply,
    ChatReply,
    ToolCallReply,
    Usage,
    usage_of,
)
from haori.server.openai.replying import Heading, finish_of
from haori.server.openai.streaming import DONE
from haori.server.openai.token_texts import TokenTexts
from haori.server.openai.tools import CallPlan
from haori.server.tools import CallArguments, CallBegun, CallEvent, CallReader, TextFound

__all__ = ["ChatForm", "call_id"]

_LETTERS = string.ascii_letters + string.digits


class ChatForm:
    """Writes chat replies.

    Args:
        head: What replies begin with.
        texts: Reads single tokens.
        plan: The tools; None without.
        logprobs: Whether log-probabilities are reported.
        usage: Whether a stream ends with token counts.
    """

    named: ClassVar = False
    end: ClassVar = DONE

    def __init__(self, head: Heading, texts: TokenTexts, plan: CallPlan | None, *, logprobs: bool, usage: bool) -> None:
        self._head = head
        self._texts = texts
        self._plan = plan
        self._logprobs = logprobs
        self._usage = usage
        self._readers: dict[int, CallReader] = {}

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        """Return the reply with all answers; log-probabilities are made when they are due."""
        choices = [
            ChatChoice(
                index=index,
                message=self._message(index, answer),
                logprobs=None,
                finish_reason=self._ending(index, answer) or "stop",
            )
            for index, answer in enumerate(answers)
        ]
        reply = ChatReply(**self._head.fields(), choices=choices, usage=usage).model_dump()
        if self._logprobs:
            for choice, answer in zip(reply["choices"], answers, strict=True):
                choice["logprobs"] = {"content": self._texts.chat_items(answer.logprobs), "refusal": None}
        return reply

    def opening(self, choices: int) -> Iterable[dict[str, Any]]:
        """Return an event with the role for each answer."""
        return [self._event(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def events(self, index: int, chunk: StreamChunk) -> Iterable[dict[str, Any]]:
        """Return the events for a stream chunk: one for each stretch of text and each part of a call."""
        logprobs = self._texts.chat(chunk.logprobs).model_dump() if chunk.logprobs else None
        parts = self._call_events(index, chunk.text, ends=chunk.finish is not None)
        contents = [self._content(part) for part in parts]
        if not contents and (chunk.finish is not None or logprobs is not None):
            contents = [{} if logprobs is None else {"content": ""}]
        last = len(contents) - 1
        return [
            self._event(
                index, content, logprobs=logprobs if number == 0 else None,
                finish=self._ending(index, chunk) if number == last else None,
            )
            for number, content in enumerate(contents)
        ]  # fmt: skip

    def closing(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """Return the event with the token counts, where it was asked for."""
        if not self._usage:
            return []
        head = {"object": "chat.completion.chunk", **self._head.fields()}
        return [{**head, "choices": [], "usage": usage_of(answers).model_dump()}]

    def failure(self, error: ApiError) -> Iterable[dict[str, Any]]:
        """Return the error."""
        return [error.body()]

    def _call_events(self, index: int, text: str, *, ends: bool) -> list[CallEvent]:
        """Return the text and calls in a further part of an answer."""
        if self._plan is None:
            return [TextFound(text)] if text else []
        if index not in self._readers:
            self._readers[index] = self._plan.reader()
        reader = self._readers[index]
        return [*reader.push(text), *(reader.close() if ends else [])]

    def _message(self, index: int, answer: Answer) -> ChatMessageReply:
        content: list[str] = []
        calls: list[ToolCallReply] = []
        for event in self._call_events(index, answer.text, ends=True):
            match event:
                case TextFound(text):
                    content.append(text)
                case CallBegun(_, name):
                    calls.append(
                        ToolCallReply(id=self._call_id(), function=CalledFunctionReply(name=name, arguments=""))
                    )
                case CallArguments(_, text, _):
                    calls[-1].function.arguments += text
        return ChatMessageReply(content="".join(content) or (None if calls else ""), tool_calls=calls or None)

    def _content(self, event: CallEvent) -> dict[str, Any]:
        """Return the delta that says an event."""
        match event:
            case TextFound(text):
                return {"content": text}
            case CallBegun(number, name):
                call = {"id": self._call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
                return {"tool_calls": [{"index": number, **call}]}
            case CallArguments(number, text, _):
                return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}

    def _ending(self, index: int, ended: StreamChunk | Answer) -> ChatEnding | None:
        """Return why an answer ended; one that was cut off within a call did not end for its calls."""
        reader, finish = self._readers.get(index), finish_of(ended)
        return "tool_calls" if finish == "stop" and reader and reader.calls and not reader.cut_off else finish

    def _call_id(self) -> str:
        return call_id(short=self._plan is not None and self._plan.form.short_ids)

    def _event(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {"object": "chat.completion.chunk", **self._head.fields(), "choices": [choice]}
        return {**chunk, "usage": None} if self._usage else chunk


def call_id(*, short: bool) -> str:
    """Return the id of a new call; `short` for templates that take nine letters and digits."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9)) if short else f"call_{secrets.token_hex(12)}"
