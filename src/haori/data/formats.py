"""Row formats: which columns a row has, and how it becomes a conversation.

    messages           messages: [{role, content, loss?}]             (OpenAI; `weight: 0` is `loss: false`)
    sharegpt           conversations: [{from, value}]
    alpaca             instruction, input? | context?, output | response
    prompt-completion  prompt, completion | response                  (texts, or lists of messages)
    query-response     query, response; question, answer | response; input, output
    text               text

`system` (or `system_prompt`) and `tools` may stand beside any but `text`, and reasoning beside a completion. Column
names are compared without case. The format is found per file, from the columns of all its rows. Everything that is not
as it should be is a `DataError` that names file, row and field.
"""

from collections.abc import Callable, Iterable, Mapping

from haori.core.errors import DataError, nearest
from haori.data.conversation import Conversation, Message
from haori.data.messages import REASONING, MessageReader
from haori.data.readers import RawRow, shorten
from haori.data.row_problem import problem, value_of
from haori.data.section import Columns, TextSection
from haori.data.tool_rows import link_results, read_tools

__all__ = ["Converter", "converter_for", "fits_another"]

Converter = Callable[[RawRow], Conversation]

_PAIRS = {
    ("prompt", "completion"): "prompt-completion",
    ("prompt", "response"): "prompt-completion",
    ("query", "response"): "query-response",
    ("question", "answer"): "query-response",
    ("question", "response"): "query-response",
    ("input", "output"): "query-response",
}
_SYSTEM = ("system", "system_prompt")
_NEEDS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction and output (or response)",
    "prompt-completion": "prompt and completion",
    "query-response": "query and response",
    "text": "text",
}
_KNOWN = (
    "messages; conversations; instruction + output; instruction + response; prompt + completion; prompt + response; "
    "query + response; question + answer; question + response; input + output; text"
)


def converter_for(
    section: TextSection, columns: Iterable[str], file: str, reader: MessageReader | None = None
) -> tuple[str, frozenset[str], Converter]:
    """Choose how rows of a file become conversations.

    Args:
        section: Its `format` and `columns` come before detection.
        columns: Column names of the file.
        file: The file, for messages.
        reader: Reads messages and counts what it meets.

    Returns:
        The format's name, the columns that are used, and the conversion.

    Raises:
        DataError: The columns fit no known format, or not the one that was asked for.
    """
    reader = reader or MessageReader()
    names = {str(column).strip().lower(): str(column) for column in columns}
    if {"chosen", "rejected"} <= names.keys():
        raise DataError(
            f"{file} holds preference pairs (chosen, rejected), which the task causal_lm cannot use; learn from them "
            "with --task preference, or keep the chosen answers as a column named completion."
        )
    if section.columns is not None:
        return _mapped(section, section.columns, list(names.values()), file, reader)
    found = _detect(names, section.format)
    if found is None:
        raise DataError(_unknown_columns(list(names.values()), section.format, file))
    name, used = found
    columns_used = {role: names[column] for role, column in used.items()}
    system = next((column for column in _SYSTEM if column in names), None)
    if system is not None and name != "text":
        columns_used["system"] = names[system]
    if name != "text":
        columns_used |= {part: names[column] for part, column in _tools(names, name).items()}
    return name, frozenset(columns_used.values()), _BUILDERS[name](columns_used, reader)


def _tools(names: Mapping[str, str], kind: str) -> dict[str, str]:
    """Return the column of tools; `functions`, as OpenAI once called it, is one only beside messages."""
    return _first(names, "tools", ("tools", "functions") if kind in {"messages", "sharegpt"} else ("tools",))


def fits_another(name: str, used: Iterable[str], row: RawRow) -> str | None:
    """Name the format of a row that holds none of the columns its file is read by, but all of another format."""
    filled = {str(column).strip().lower(): str(column) for column, value in row.values.items() if value}
    if any(row.values.get(column) for column in used):
        return None
    found = _detect(filled, "auto")
    return found[0] if found is not None and found[0] != name else None


def _detect(names: Mapping[str, str], wanted: str) -> tuple[str, dict[str, str]] | None:
    """Return the format and which column plays which part, or None."""
    candidates: list[tuple[str, dict[str, str]]] = []
    if "messages" in names:
        candidates.append(("messages", {"messages": "messages"}))
    if "conversations" in names:
        candidates.append(("sharegpt", {"messages": "conversations"}))
    extra = _first(names, "reasoning", REASONING)
    for output in ("output", "response"):
        if {"instruction", output} <= names.keys():
            more = _first(names, "input", ("input", "context")) | _first(names, "history", ("history",)) | extra
            candidates.append(("alpaca", {"prompt": "instruction", "completion": output, **more}))
    for (prompt, completion), name in _PAIRS.items():
        if {prompt, completion} <= names.keys():
            candidates.append((name, {"prompt": prompt, "completion": completion, **extra}))
    if "text" in names:
        candidates.append(("text", {"text": "text"}))
    return next((c for c in candidates if wanted in ("auto", c[0])), None)


def _first(names: Mapping[str, str], part: str, columns: Iterable[str]) -> dict[str, str]:
    return next(({part: column} for column in columns if column in names), {})


def _mapped(
    section: TextSection, mapping: Columns, present: list[str], file: str, reader: MessageReader
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
    if kind != "text" and "tools" in present:
        given["tools"] = "tools"
    return kind, frozenset(given.values()), _BUILDERS[kind](given, reader)


def _unknown_columns(present: list[str], wanted: str, file: str) -> str:
    if wanted != "auto":
        return f"{file} has the columns {_listed(present)}, but the format {wanted!r} needs {_NEEDS[wanted]}."
    known = sorted({name for pair in _PAIRS for name in pair} | {"messages", "conversations", "instruction", "text"})
    close = [f"{column!r} is near {hint.removeprefix('did you mean ').rstrip('?')}"
             for column in present if column.strip().lower() not in known
             and (hint := nearest(column.lower(), known, limit=1))]  # fmt: skip
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


def _text_builder(columns: Mapping[str, str], _: MessageReader) -> Converter:
    def convert(row: RawRow) -> Conversation:
        return Conversation((), row.origin, text=_text(row, columns["text"]))

    return convert


def _messages_builder(columns: Mapping[str, str], reader: MessageReader) -> Converter:
    def convert(row: RawRow) -> Conversation:
        messages = reader.messages(row, columns["messages"])
        system = _text(row, columns["system"], optional=True) if "system" in columns else ""
        return _finished(row, messages, system, columns["messages"], columns.get("tools"))

    return convert


def _pair_builder(columns: Mapping[str, str], reader: MessageReader) -> Converter:
    def convert(row: RawRow) -> Conversation:
        system = _text(row, columns["system"], optional=True) if "system" in columns else ""
        if isinstance(row.values.get(columns["prompt"]), list):
            messages = reader.messages(row, columns["prompt"])
        else:
            prompt = _text(row, columns["prompt"])
            more = _text(row, columns["input"], optional=True) if "input" in columns else ""
            messages = _history(row, columns.get("history"))
            asked = [part for part in (prompt, more) if part.strip()]
            messages.append(Message(role="user", content="\n\n".join(asked) if more.strip() else prompt))
        if isinstance(row.values.get(columns["completion"]), list):
            messages += reader.messages(row, columns["completion"])
        else:
            messages.append(Message(role="assistant", content=_text(row, columns["completion"])))
        if "reasoning" in columns:
            _add_reasoning(row, columns["reasoning"], messages, reader)
        return _finished(row, messages, system, columns["completion"], columns.get("tools"))

    return convert


def _add_reasoning(row: RawRow, column: str, messages: list[Message], reader: MessageReader) -> None:
    """Put what a column says was thought before the last answer, unless the answer says it itself."""
    thoughts = row.values.get(column)
    if isinstance(thoughts, str) and thoughts.strip() and messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("reasoning_content", thoughts)
    elif thoughts is not None and not isinstance(thoughts, str):
        reader.unused[f"{column} (no text)"] += 1


_BUILDERS: dict[str, Callable[[Mapping[str, str], MessageReader], Converter]] = {
    "messages": _messages_builder,
    "sharegpt": _messages_builder,
    "alpaca": _pair_builder,
    "prompt-completion": _pair_builder,
    "query-response": _pair_builder,
    "text": _text_builder,
}


def _text(row: RawRow, column: str, *, optional: bool = False) -> str:
    """Return a column's text; a null counts as blank (the row is then counted as empty)."""
    value = row.values.get(column) if optional else value_of(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise problem(row, column, f"this must be text, not {type(value).__name__} {shorten(value, 40)}")
    return value


def _finished(row: RawRow, messages: list[Message], system: str, field: str, tools: str | None) -> Conversation:
    if system.strip() and not any(m["role"] == "system" for m in messages):
        messages = [Message(role="system", content=system), *messages]
    if messages and messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        raise problem(
            row, field, f"the last message must be the assistant's, not the {role}'s; there is nothing to learn"
        )
    defined = read_tools(row, tools) if tools is not None else ()
    return Conversation(tuple(link_results(row, field, messages)), row.origin, tools=defined)


def _history(row: RawRow, column: str | None) -> list[Message]:
    """Read alpaca's `history`: pairs of question and answer."""
    messages: list[Message] = []
    pairs = row.values.get(column) if column else None
    for pair in pairs or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise problem(row, str(column), "history must be a list of [question, answer] pairs of texts")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    return messages
