"""One message of a row: its role, text, reasoning and loss flag, however the tool that wrote it spells them.

A field that is none of these is counted, so that a report can say that it was there and not used. Knows nothing about
columns.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from haori.data.conversation import ROLES, Message
from haori.data.readers import RawRow, shorten
from haori.data.row_problem import problem, value_of
from haori.data.tool_rows import read_calls

__all__ = ["REASONING", "MessageReader"]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What is thought before an answer, as vLLM and DeepSeek, OpenRouter, and TRL call it."""

# Roles as datasets in the wild spell them.
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "ai": "assistant", "llm": "assistant", "claude": "assistant",
    "developer": "system",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALLER = "function_call"
_ROLE_NAMES |= dict.fromkeys(("function_call", "tool_call", "tool_calls", "function-call", "tool-call"), _CALLER)
"""A role of its own for calls, whose content is their JSON, as ShareGPT's data sets have it."""
_TRAINS = ("loss", "train", "training", "trainable", "train_on_turn", "loss_mask", "weight")
_MASKS = ("mask", "masked")
_CALLS = ("tool_calls", "function_call")
_OF_RESULTS: frozenset[Literal["tool_call_id", "name"]] = frozenset({"tool_call_id", "name"})
_PARTS = ("train_detail", "training_detail")
_READ = frozenset({"role", "content", "from", "value", *REASONING, *_TRAINS, *_MASKS, *_CALLS, *_PARTS})


class MessageReader:
    """Reads messages, and counts what it met beside their text.

    Attributes:
        unused: Fields that are not understood, by name, with the messages that hold them.
        masked: Flags of other tools and ours that say not to train an answer, with the answers that they mask.
    """

    def __init__(self) -> None:
        self.unused: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()

    def messages(self, row: RawRow, column: str) -> list[Message]:
        """Return the messages of a column; a null counts as none (the row is then counted as empty).

        Raises:
            DataError: Something in them is not as it should be.
        """
        value = value_of(row, column)
        if value is None:
            return []
        value = _as_list(value)
        if not isinstance(value, list):
            raise problem(row, column, f"this must be a list of messages, not {type(value).__name__}")
        return [self._message(row, f"{column}[{i}]", item) for i, item in enumerate(value)]

    def _message(self, row: RawRow, field: str, item: Any) -> Message:
        if not isinstance(item, dict):
            raise problem(row, field, f"a message must be an object with role and content, not {type(item).__name__}")
        role_key, text_key = ("role", "content") if item.get("role") is not None else ("from", "value")
        if item.get(text_key) is None:
            text_key = next((key for key in ("content", "value") if item.get(key) is not None), text_key)
        role = _role(row, field, role_key, item.get(role_key))
        if found := next((key for key in _PARTS if item.get(key)), None):
            raise problem(
                row, f"{field}.{found}", "parts of a message cannot be trained; train the whole of it or none"
            )
        calls = _calls(row, field, item, role, text_key)
        if role == _CALLER:
            role, text, thoughts = "assistant", "", ""
        elif calls and item.get(text_key) is None:
            text, thoughts = "", ""
        else:
            text, thoughts = self._content(row, f"{field}.{text_key}", item.get(text_key), role)
        message = Message(role=role, content=text)
        if calls:
            message["tool_calls"] = calls
        for key in _OF_RESULTS if role == "tool" else ():
            if isinstance(item.get(key), str) and item[key]:
                message[key] = item[key]
        if reasoning := self._reasoning(row, field, item, thoughts, role):
            message["reasoning_content"] = reasoning
        if self._is_masked(row, field, item, role):
            message["loss"] = False
        read = _READ - {"role", "content", "from", "value"} | {role_key, text_key}
        read |= _OF_RESULTS if role == "tool" else set()
        self.unused.update(str(key) for key, value in item.items() if key not in read and value not in (None, [], {}))
        return message

    def _content(self, row: RawRow, field: str, value: Any, role: str) -> tuple[str, str]:
        """Return text and reasoning of a message's content, which may be a list of parts."""
        if isinstance(value, list):
            texts: list[str] = []
            thoughts: list[str] = []
            for i, part in enumerate(value):
                kind = part.get("type") if isinstance(part, dict) else None
                key = "text" if kind == "text" else kind if kind in REASONING and role == "assistant" else ""
                if not key or not isinstance(part.get(key), str):
                    raise problem(row, f"{field}[{i}]", 'only parts {"type": "text", "text": "..."} can be used')
                (texts if kind == "text" else thoughts).append(part[key])
                extra = (str(name) for name, held in part.items() if name not in {"type", key} and held is not None)
                self.unused.update(f"content[].{name}" for name in extra)
            return "".join(texts), "".join(thoughts)
        if not isinstance(value, str):
            given = "missing" if value is None else f"{type(value).__name__} {shorten(value, 40)}"
            raise problem(row, field, f"content must be text; it is {given}")
        return value, ""

    def _reasoning(self, row: RawRow, field: str, item: Mapping[str, Any], thoughts: str, role: str) -> str:
        found = {key: item[key] for key in REASONING if item.get(key) not in (None, "", [])}
        if role != "assistant":
            self.unused.update(f"{key} (of {role} turns)" for key in found)
            return ""
        texts = [thoughts] if thoughts.strip() else []
        for key, value in found.items():
            text = self._content(row, f"{field}.{key}", value, role)[0]
            if text.strip() and text not in texts:
                texts.append(text)
        if len(texts) > 1:
            raise problem(row, f"{field}.{next(iter(found))}", "the reasoning is given twice and differs; keep one")
        return texts[0] if texts else ""

    def _is_masked(self, row: RawRow, field: str, item: Mapping[str, Any], role: str) -> bool:
        """Say whether the flags of a message keep it from being trained."""
        flags = {key: _flag(row, f"{field}.{key}", item[key]) for key in (*_TRAINS, *_MASKS) if _is_set(item, key)}
        trained = {key: value == (key in _TRAINS) for key, value in flags.items()}
        if role != "assistant":
            if flags.get("loss"):
                raise problem(row, f"{field}.loss", f"only an assistant's message can be trained, not the {role}'s")
            self.unused.update(f"{key} (asks to train {role} turns)" for key in _TRAINS if flags.get(key))
            return False
        if len(set(trained.values())) > 1:
            said = " and ".join(f'"{key}": {str(item[key]).lower()}' for key in trained)
            raise problem(row, f"{field}.{next(iter(trained))}", f"{said} contradict each other; keep one")
        self.masked.update(key for key, value in trained.items() if not value)
        return not all(trained.values())


def _as_list(value: Any) -> Any:
    """Return messages that are the JSON of a list, or a list for each of their fields, as a list of messages."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, dict) or not all(isinstance(part, list) for part in value.values()):
        return value
    if len({len(part) for part in value.values()}) != 1:
        return value
    return [dict(zip(value, parts, strict=True)) for parts in zip(*value.values(), strict=True)]


def _calls(row: RawRow, field: str, item: Mapping[str, Any], role: str, text_key: str) -> list[dict[str, Any]]:
    """Return the calls of a message."""
    given = [(key, item[key]) for key in _CALLS if item.get(key)]
    if role == _CALLER:
        given.insert(0, (text_key, item.get(text_key)))
    elif given and role != "assistant":
        raise problem(row, f"{field}.{given[0][0]}", f"only an assistant's message can call tools, not the {role}'s")
    if len(given) > 1:
        raise problem(row, f"{field}.{given[1][0]}", f"calls are given twice, also in {given[0][0]}; keep one")
    return read_calls(row, f"{field}.{given[0][0]}", given[0][1]) if given else []


def _role(row: RawRow, field: str, key: str, spelt: Any) -> str:
    role = _ROLE_NAMES.get(spelt.strip().lower()) if isinstance(spelt, str) else None
    if role is None:
        what = f"{spelt!r} is not a known role" if spelt is not None else "the role is missing"
        where = f"{field}.{key if spelt is not None else 'role'}"
        raise problem(row, where, f"{what}; allowed are {', '.join(ROLES)}")
    return role


def _is_set(item: Mapping[str, Any], key: str) -> bool:
    return item.get(key) is not None


def _flag(row: RawRow, field: str, value: Any) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        name = field.rpartition(".")[2]
        allowed = "0 or 1" if name == "weight" else "true or false"
        raise problem(row, field, f"{name} must be {allowed}, not {shorten(value, 40)}")
    return bool(value)
