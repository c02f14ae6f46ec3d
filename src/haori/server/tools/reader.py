"""Finds calls in an answer while it is written.

A call without a grammar is sent once it is complete, for until then it may turn out to be none: what is malformed, or
names a function that was not offered, stays text, unchanged. A call that a grammar keeps to its form and schema
cannot fail, so its arguments are sent as they are written. White space beside a call belongs to it.
"""

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from haori.server.tools.events import CallArguments, CallBegun, CallEvent, TextFound
from haori.server.tools.formats import Marks, ToolFormat
from haori.server.tools.json_end import JsonEnd

__all__ = ["CallReader"]

_KEYS = frozenset({"name", "arguments", "parameters", "id", "type"})
_FIRST_KEY = re.compile(r'\[?\s*\{\s*"((?:[^"\\]|\\.)*)"')
_NO_MARKS = Marks("", "")


class CallReader:
    """Reads one answer.

    Args:
        form: How calls are written.
        names: Functions that may be called.
        kept: Whether the engine keeps calls to their form.
        most: Calls that are wanted; what follows them is left out.

    Attributes:
        calls: How many have begun.
        cut_off: Whether the last one lacks its end.
    """

    def __init__(
        self, form: ToolFormat, names: Collection[str], *, kept: bool = False, most: int | None = None
    ) -> None:
        self.calls = 0
        self.cut_off = False
        self._form = form
        self._names = names
        self._kept = kept
        self._most = most
        self._heads = {f'{{"name": {json.dumps(name)}, "{form.key}": ': name for name in names}
        self._state: Literal["start", "text", "value", "arguments", "after", "done"] = "start" if form.bare else "text"
        self._buffer = ""
        self._lead = ""  # what was taken off the buffer for the call that is being read
        self._marks = _NO_MARKS
        self._json = JsonEnd()
        self._scanned = 0
        self._events: list[CallEvent] = []

    def push(self, text: str) -> list[CallEvent]:
        """Return what is certain now and was not before."""
        self._buffer += text
        steps = {
            "start": self._start, "text": self._text, "value": self._kept_value if self._kept else self._value,
            "arguments": self._arguments, "after": self._after, "done": self._done,
        }  # fmt: skip
        while self._buffer and steps[self._state]():
            pass
        events, self._events = self._events, []
        return events

    def close(self) -> list[CallEvent]:
        """Return the rest, after the last text."""
        events: list[CallEvent] = []
        while self._state == "value":  # a call without its end is text, which may hold another one
            self._give_back()
            events += self.push("")
        rest, self._buffer = self._buffer, ""
        closing = self._state == "after" and self._marks.closing.startswith(rest.strip())
        if rest and not closing and not (self.calls and rest.isspace()):
            events.append(TextFound(rest))
        return events

    def _start(self) -> bool:
        """Look whether the answer begins with JSON."""
        rest = self._buffer.lstrip()
        if not rest:
            return False
        if rest[0] in "{[":
            self._enter(self._buffer[: -len(rest)], rest, _NO_MARKS)
        else:
            self._state = "text"
        return True

    def _text(self) -> bool:
        """Say text up to the next mark; hold back what may be the beginning of one, and white space."""
        found = [(position, marks) for marks in self._form.marks if (position := self._buffer.find(marks.opening)) >= 0]
        if found:
            position, marks = min(found, key=lambda one: one[0])
            text = self._buffer[:position].rstrip()
            self._say(text)
            begin = position + len(marks.opening)
            self._enter(self._buffer[len(text) : begin], self._buffer[begin:], marks)
            return True
        sure = len(self._buffer) - max(_overlap(self._buffer, marks.opening) for marks in self._form.marks)
        text = self._buffer[:sure].rstrip()
        self._say(text)
        self._buffer = self._buffer[len(text) :]
        return False

    def _value(self) -> bool:
        """Read a call, or a list of them, to its end."""
        begin = len(self._buffer) - len(self._buffer.lstrip())
        if begin == len(self._buffer):
            return False
        if self._buffer[begin] not in "{[":
            return self._give_back()
        for position in range(max(begin, self._scanned), len(self._buffer)):
            self._json.push(self._buffer[position])
            if self._json.broken:
                return self._give_back()
            if self._json.complete:
                return self._take(self._buffer[begin : position + 1], self._buffer[position + 1 :])
        self._scanned = len(self._buffer)
        key = _FIRST_KEY.match(self._buffer, begin)
        return self._give_back() if key and key[1] not in _KEYS else False

    def _kept_value(self) -> bool:
        """Read the head of a call, whose form is certain but for the white space before it."""
        rest = self._buffer.lstrip(" \t\r\n[")
        for head, name in self._heads.items():
            if rest.startswith(head):
                self._events.append(CallBegun(self.calls, name))
                self.calls += 1
                self.cut_off = True
                self._state, self._buffer, self._json = "arguments", rest[len(head) :], JsonEnd()
                return True
        return False if any(head.startswith(rest) for head in self._heads) else self._give_back()

    def _arguments(self) -> bool:
        """Send arguments as they come."""
        for position, letter in enumerate(self._buffer):
            self._json.push(letter)
            if self._json.complete:
                self._events.append(CallArguments(self.calls - 1, self._buffer[: position + 1], ends=True))
                self.cut_off = False
                self._buffer = self._buffer[position + 1 :].removeprefix("}")
                self._end_call()
                return True
        self._events.append(CallArguments(self.calls - 1, self._buffer, ends=False))
        self._buffer = ""
        return False

    def _after(self) -> bool:
        """Look what follows a call: its end, a further call, or text."""
        rest = self._buffer.lstrip(" \t\r\n}]" if self._kept else None)
        if self._kept:
            self._buffer = rest
        closing = self._marks.closing
        if not rest or (closing and closing.startswith(rest)):
            return False
        if closing and rest.startswith(closing):
            self._state, self._buffer = "text", rest[len(closing) :]
            return True
        further = rest[1:].lstrip() if rest[0] in ",;" else rest
        if not further:
            return False
        if further[0] in "{[":
            self._enter(self._buffer[: -len(further)], further, self._marks)
        else:
            self._state = "text"
        return True

    def _done(self) -> bool:
        self._buffer = ""
        return False

    def _enter(self, lead: str, rest: str, marks: Marks) -> None:
        self._state, self._lead, self._buffer, self._marks = "value", lead, rest, marks
        self._json, self._scanned = JsonEnd(), 0

    def _give_back(self) -> bool:
        """Say what looked like the beginning of a call; what follows it is looked at again."""
        self._say(self._lead)
        self._lead = ""
        self._state = "text"
        return True

    def _take(self, value: str, rest: str) -> bool:
        calls = _calls_in(value, self._names)
        if calls is None:
            return self._give_back()
        for name, arguments in calls:
            if self._state != "done":
                self._events += [CallBegun(self.calls, name), CallArguments(self.calls, arguments, ends=True)]
                self.calls += 1
                self._end_call()
        self._buffer = rest
        return True

    def _end_call(self) -> None:
        self._lead = ""
        self._state = "done" if self.calls == self._most else "after"

    def _say(self, text: str) -> None:
        if text:
            self._events.append(TextFound(text))


def _overlap(text: str, mark: str) -> int:
    """Return how many letters at the end of `text` are the beginning of `mark`."""
    return next((size for size in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:size])), 0)


def _calls_in(value: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """Return name and arguments of each call in a JSON value; None if it is anything but calls."""
    try:
        found = json.loads(value, strict=False)  # models write line ends into strings as they are
    except (ValueError, RecursionError):
        return None
    calls = [_call(item, names) for item in (found if isinstance(found, list) else [found])]
    whole = [call for call in calls if call is not None]
    return whole if calls and len(whole) == len(calls) else None


def _call(item: Any, names: Collection[str]) -> tuple[str, str] | None:
    if not isinstance(item, dict) or not item.keys() <= _KEYS or {"arguments", "parameters"} <= item.keys():
        return None
    name, arguments = item.get("name"), item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    return name, text if text.isascii() or _can_be_sent(text) else json.dumps(arguments)


def _can_be_sent(text: str) -> bool:
    """Say whether text is whole characters: JSON may hold halves of them."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
