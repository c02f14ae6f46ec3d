"""The items of a response while it is written: messages and calls, and their events."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from haori.server.openai.chat_form import call_id
from haori.server.tools import CallArguments, CallBegun, CallEvent, TextFound

__all__ = ["ResponseItems"]

Event = dict[str, Any]


class ResponseItems:
    """Items of one answer.

    Args:
        short_ids: Whether ids of calls are nine letters and digits.

    Attributes:
        items: As far as they have come.
    """

    def __init__(self, *, short_ids: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._short_ids = short_ids
        self._open = False

    def take(self, found: Iterable[CallEvent], logprobs: Sequence[dict[str, Any]]) -> list[Event]:
        """Add what was found in a stream chunk, and return the events."""
        events: list[Event] = []
        left = list(logprobs)
        for event in found:
            match event:
                case TextFound(text):
                    events += self._say(text, left)
                    left = []
                case CallBegun(_, name):
                    events += [*self.end("completed"), *self._begin_call(name)]
                case CallArguments(_, text, ends):
                    self.items[-1]["arguments"] += text
                    events.append(self._event("response.function_call_arguments.delta", delta=text))
                    events += self.end("completed") if ends else []
        return events + self._say("", left) if left else events

    def first_message(self) -> int:
        """Return the index of the first message, where log-probabilities go; an empty one is added if there is none."""
        for index, item in enumerate(self.items):
            if item["type"] == "message":
                return index
        self._begin_message()
        return len(self.items) - 1

    def close(self, status: str) -> list[Event]:
        """End the last item, and return the events; an empty answer is an empty message."""
        events = [] if self.items else self._begin_message()
        if self.items and not self._open:
            self.items[-1]["status"] = status
        return events + self.end(status)

    def end(self, status: str) -> list[Event]:
        """End the item that is being written, if there is one."""
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = [
                self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
            ]
        else:
            [part] = item["content"]
            done = [
                self._event(
                    "response.output_text.done", content_index=0, text=part["text"], logprobs=list(part["logprobs"])
                ),
                self._event("response.content_part.done", content_index=0, part=dict(part)),
            ]
        return [*done, self._item_event("response.output_item.done")]

    def _say(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events = [] if self._open and self.items[-1]["type"] == "message" else self._begin_message()
        [part] = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        return [*events, self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _begin_message(self) -> list[Event]:
        item: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "status": "in_progress",
            "content": [],
        }  # fmt: skip
        events = self._begin(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events.append(self._event("response.content_part.added", content_index=0, part={**part, "logprobs": []}))
        item["content"] = [part]
        return events

    def _begin_call(self, name: str) -> list[Event]:
        return self._begin({
            "id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": call_id(short=self._short_ids),
            "name": name, "arguments": "", "status": "in_progress",
        })  # fmt: skip

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self.items.append(item)
        self._open = True
        return [self._item_event("response.output_item.added")]

    def _item_event(self, kind: str) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
