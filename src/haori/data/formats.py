"""Row formats: which columns a row has, and how it becomes a conversation.

    messages           messages: [{role, content, loss?}]             (OpenAI; `weight: 0` is `loss: false`)
    sharegpt           conversations: [{from, value}]
    alpaca             instruction, input?, output
    prompt-completion  prompt, completion | response                  (texts, or lists of messages)
    query-response     query, response; question, answer | response; input, output
    text               text

`system` may stand beside any but `text`. Column names are compared without case. The format is found per file,
from its first row. Everything that is not as it should be is a `DataError` that names file, row and field.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from haori.core.errors import DataError, nearest
from haori.core.recipe import Columns, DataSection
from haori.data.conversation import ROLES, Conversation, Message
from haori.data.readers import RawRow, shorten

__all__ = ["Converter", "converter_for"]

Converter = Callable[[RawRow], Conversation]

# Roles as datasets in the wild spell them.
_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "developer": "system", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_PAIRS = {
    ("prompt", "completion"): "prompt-completion",
    ("prompt", "response"): "prompt-completion",
    ("query", "response"): "query-response",
    ("question", "answer"): "query-response",
    ("question", "response"): "query-response",
    ("input", "output"): "query-response",
}
_NEEDS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction and output",
    "prompt-completion": "prompt and completion",
    "query-response": "query and response",
    "text": "text",
}
_KNOWN = (
    "messages; conversations; instruction + output; prompt + completion; query + response; "
    "question + answer; input + output; text"
)


def converter_for(section: DataSection, columns: Iterable[str], file: str) -> tuple[str, frozenset[str], Converter]:
    """Choose how rows of a file become conversations.

    Args:
        section: Its `format` and `columns` come before detection.
        columns: Column names of the file's first row.
        file: The file, for messages.

    Returns:
        The format's name, the columns that are used, and the conversion.

    Raises:
        DataError: The columns fit no known format, or not the one that was asked for.
    """
    names = {str(column).strip().lower(): str(column) for column in columns}
    if {"chosen", "rejected"} <= names.keys():
        raise DataError(
            f"{file} holds preference pairs (chosen, rejected), which supervised training cannot use; "
            "keep the chosen answers as a column named completion."
        )
    if section.columns is not None:
        return _mapped(section, section.columns, list(names.values()), file)
    found = _detect(names, section.format)
    if found is None:
        raise DataError(_unknown_columns(list(names.values()), section.format, file))
    name, used = found
    columns_used = {role: names[column] for role, column in used.items()}
    if "system" in names and name != "text":
        columns_used["system"] = names["system"]
    return name, frozenset(columns_used.values()), _BUILDERS[name](columns_used)


def _detect(names: Mapping[str, str], wanted: str) -> tuple[str, dict[str, str]] | None:
    """Return the format and which column plays which part, or None."""
    candidates: list[tuple[str, dict[str, str]]] = []
    if "messages" in names:
        candidates.append(("messages", {"messages": "messages"}))
    if "conversations" in names:
        candidates.append(("sharegpt", {"messages": "conversations"}))
    if {"instruction", "output"} <= names.keys():
        extra = {part: part for part in ("input", "history") if part in names}
        candidates.append(("alpaca", {"prompt": "instruction", "completion": "output", **extra}))
    for (prompt, completion), name in _PAIRS.items():
        if {prompt, completion} <= names.keys():
            candidates.append((name, {"prompt": prompt, "completion": completion}))
    if "text" in names:
        candidates.append(("text", {"text": "text"}))
    return next((c for c in candidates if wanted in ("auto", c[0])), None)


def _mapped(
    section: DataSection, mapping: Columns, present: list[str], file: str
) -> tuple[str, frozenset[str], Converter]:
    given = {part: column for part, column in mapping.model_dump().items() if column is not None}
    for part, column in given.items():
        if column not in present:
            hint = nearest(column, present) or f"the columns are {_listed(present)}."
            raise DataError(f"{file} has no column {column!r} (data.columns.{part}); {hint}")
    parts = frozenset(given) - {"system"}
    kinds = {frozenset({"messages"}): "messages", frozenset({"text"}): "text"}
    kinds[frozenset({"prompt", "completion"})] = "prompt-completion"
    kind = kinds.get(parts)
    if kind is None or (kind == "text" and "system" in given):
        raise DataError(
            "data.columns must name a prompt and a completion, or text, or messages "
            f"(and may name a system column beside a prompt or messages), not {_listed(sorted(given))}."
        )
    alike = {"messages": ("messages", "sharegpt"), "text": ("text",)}.get(kind, tuple(_PAIRS.values()))
    if section.format not in ("auto", *alike):
        raise DataError(f"data.columns describes the format {kind!r}, but data.format is {section.format!r}; drop one.")
    return kind, frozenset(given.values()), _BUILDERS[kind](given)


def _unknown_columns(present: list[str], wanted: str, file: str) -> str:
    if wanted != "auto":
        return f"{file} has the columns {_listed(present)}, but the format {wanted!r} needs {_NEEDS[wanted]}."
    known = sorted({name for pair in _PAIRS for name in pair} | {"messages", "conversations", "instruction", "text"})
    close = [f"{column!r} is near {hint.removeprefix('did you mean ').rstrip('?')}"
             for column in present if (hint := nearest(column.lower(), known, limit=1))]  # fmt: skip
    hint = f" ({'; '.join(close)})" if close else ""
    first, second = [*present, "PROMPT", "COMPLETION"][:2] if len(present) != 1 else (present[0], "COMPLETION")
    return (
        f"{file} has the columns {_listed(present)}{hint}, which fit no known format ({_KNOWN}); say which is which "
        f"with --set data.columns.prompt={first} --set data.columns.completion={second}, "
        f"or --set data.columns.text={first}"
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return (shown or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _text_builder(columns: Mapping[str, str]) -> Converter:
    def convert(row: RawRow) -> Conversation:
        return Conversation((), row.origin, text=_text(row, columns["text"]))

    return convert


def _messages_builder(columns: Mapping[str, str]) -> Converter:
    def convert(row: RawRow) -> Conversation:
        messages = _messages(row, columns["messages"])
        system = _text(row, columns["system"], optional=True) if "system" in columns else ""
        return _finished(row, messages, system, columns["messages"])

    return convert


def _pair_builder(columns: Mapping[str, str]) -> Converter:
    def convert(row: RawRow) -> Conversation:
        system = _text(row, columns["system"], optional=True) if "system" in columns else ""
        if isinstance(row.values.get(columns["prompt"]), list):
            messages = _messages(row, columns["prompt"])
        else:
            prompt = _text(row, columns["prompt"])
            more = _text(row, columns["input"], optional=True) if "input" in columns else ""
            messages = _history(row, columns.get("history"))
            messages.append(Message(role="user", content=f"{prompt}\n\n{more}" if more.strip() else prompt))
        if isinstance(row.values.get(columns["completion"]), list):
            messages += _messages(row, columns["completion"])
        else:
            messages.append(Message(role="assistant", content=_text(row, columns["completion"])))
        return _finished(row, messages, system, columns["completion"])

    return convert


_BUILDERS: dict[str, Callable[[Mapping[str, str]], Converter]] = {
    "messages": _messages_builder,
    "sharegpt": _messages_builder,
    "alpaca": _pair_builder,
    "prompt-completion": _pair_builder,
    "query-response": _pair_builder,
    "text": _text_builder,
}


def _problem(row: RawRow, field: str, what: str) -> DataError:
    return DataError(f"{row.origin}:{field}: {what}; the row is {shorten(row.values)}")


def _value(row: RawRow, column: str) -> Any:
    if column not in row.values:
        raise _problem(row, column, "this row lacks the field")
    return row.values[column]


def _text(row: RawRow, column: str, *, optional: bool = False) -> str:
    """Return a column's text; a null counts as blank (the row is then counted as empty)."""
    value = row.values.get(column) if optional else _value(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _problem(row, column, f"this must be text, not {type(value).__name__} {shorten(value, 40)}")
    return value


def _finished(row: RawRow, messages: list[Message], system: str, field: str) -> Conversation:
    if row.values.get("tools"):
        raise _problem(row, "tools", "tool definitions are not supported; remove the column to train without them")
    if system.strip() and not any(m["role"] == "system" for m in messages):
        messages = [Message(role="system", content=system), *messages]
    if messages and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise _problem(
            row, field, f"the last message must be the assistant's, not the {role}'s; there is nothing to learn"
        )
    return Conversation(tuple(messages), row.origin)


def _history(row: RawRow, column: str | None) -> list[Message]:
    """Read alpaca's `history`: pairs of question and answer."""
    messages: list[Message] = []
    pairs = row.values.get(column) if column else None
    for pair in pairs or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise _problem(row, str(column), "history must be a list of [question, answer] pairs of texts")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return messages


def _messages(row: RawRow, column: str) -> list[Message]:
    value = _value(row, column)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _problem(row, column, f"this must be a list of messages, not {type(value).__name__}")
    return [_message(row, f"{column}[{i}]", item) for i, item in enumerate(value)]


def _message(row: RawRow, field: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise _problem(row, field, f"a message must be an object with role and content, not {type(item).__name__}")
    role_key, content_key = ("role", "content") if item.get("role") is not None else ("from", "value")
    spelt = item.get(role_key)
    role = _ROLE_NAMES.get(spelt.strip().lower()) if isinstance(spelt, str) else None
    if role is None:
        what = f"{spelt!r} is not a known role" if spelt is not None else "the role is missing"
        raise _problem(
            row, f"{field}.{role_key if spelt is not None else 'role'}", f"{what}; allowed are {', '.join(ROLES)}"
        )
    if item.get("tool_calls") or item.get("function_call"):
        raise _problem(
            row, f"{field}.tool_calls", "tool calls are not supported; write the call as the message's content"
        )
    message = Message(role=role, content=_content(row, f"{field}.{content_key}", item.get(content_key)))
    loss = _loss(row, field, item)
    if loss is False and role == "assistant":
        message["loss"] = False
    elif loss and role != "assistant":
        raise _problem(row, f"{field}.loss", f"only an assistant's message can be trained, not the {role}'s")
    return message


def _content(row: RawRow, field: str, value: Any) -> str:
    if isinstance(value, list):
        for i, part in enumerate(value):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _problem(row, f"{field}[{i}]", 'only parts {"type": "text", "text": "..."} can be used')
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        given = "missing" if value is None else f"{type(value).__name__} {shorten(value, 40)}"
        raise _problem(row, field, f"content must be text; it is {given}")
    return value


def _loss(row: RawRow, field: str, item: Mapping[str, Any]) -> bool | None:
    """Read `loss` (true, false), or OpenAI's `weight` (0, 1)."""
    loss, weight = item.get("loss"), item.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise _problem(row, f"{field}.loss", f"loss must be true or false, not {loss!r}")
    if weight is not None and weight not in (0, 1):
        raise _problem(row, f"{field}.weight", f"weight must be 0 or 1, not {weight!r}")
    if loss is None and weight is not None and item.get("role") == "assistant":
        return bool(weight)
    return bool(loss) if loss is not None else None
