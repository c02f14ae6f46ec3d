"""Tools of a row, calls in its messages and their results, however the tool that wrote it spells them.

All become OpenAI's form: functions with parameters, calls with an id and arguments as an object, results with the id
and name of their call. What is left out (an id, a result's call) follows from the order. Knows nothing about templates.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from haori.data.conversation import Message
from haori.data.readers import RawRow, shorten
from haori.data.row_problem import problem

__all__ = ["link_results", "read_calls", "read_tools", "tool_definition"]

_TOOLS = 'give a list of functions: [{"type": "function", "function": {"name": ..., "parameters": {...}}}]'
_CALL = 'a call must be {"name": ..., "arguments": {...}}'


def tool_definition(
    name: str, description: str | None = None, parameters: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a function as templates expect it, whatever was left out of its definition."""
    function = {
        "name": name,
        "description": description or "",
        "parameters": parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def read_tools(row: RawRow, column: str) -> tuple[dict[str, Any], ...]:
    """Return the functions of a column: a list, or its JSON; each in OpenAI's form or without its wrapper.

    Raises:
        DataError: It is something else, or a name comes twice.
    """
    value = _from_json(row.values.get(column))
    if value in (None, "", [], {}):
        return ()
    if not isinstance(value, list):
        raise problem(row, column, f"these are no tools; {_TOOLS}")
    tools = [_tool(row, f"{column}[{place}]", _from_json(tool)) for place, tool in enumerate(value)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise problem(row, column, f"the function {twice!r} is there twice; names must differ")
    return tuple(tools)


def _tool(row: RawRow, field: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise problem(row, field, f"this is no function; {_TOOLS}")
    description = function.get("description")
    parameters = _from_json(function.get("parameters"))
    if not isinstance(description, str | None) or not isinstance(parameters, dict | None):
        raise problem(row, field, "the description must be text and the parameters an object, a JSON schema")
    return tool_definition(function["name"], description, parameters)


def read_calls(row: RawRow, field: str, given: Any) -> list[dict[str, Any]]:
    """Return calls in OpenAI's form: one, a list of them, or the JSON of either; an id is left out where it is missing.

    Raises:
        DataError: One has no name, or arguments that are no object.
    """
    value = _from_json(given)
    calls = value if isinstance(value, list) else [value]
    return [_call(row, field if calls is not value else f"{field}[{place}]", _from_json(call))
            for place, call in enumerate(calls)]  # fmt: skip


def _call(row: RawRow, field: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise problem(row, field, f"{_CALL}, not {shorten(call, 60)}")
    given = function.get("arguments", function.get("parameters"))
    arguments = _from_json(given) if given not in (None, "") else {}
    if not isinstance(arguments, dict):
        raise problem(row, f"{field}.arguments", f"they must be an object or the JSON of one, not {shorten(given, 60)}")
    found: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = call.get("id")
    return {"id": identity, **found} if isinstance(identity, str) and identity else found


def link_results(row: RawRow, field: str, messages: Sequence[Message]) -> list[Message]:
    """Give every call an id, and every result the id and the name of its call.

    Results that say no id are those of the calls before them, in order. Where there are no calls at all, messages of
    tools are left as they are.

    Raises:
        DataError: A result belongs to no call before it.
    """
    if not any(message.get("tool_calls") for message in messages):
        return list(messages)
    linked: list[Message] = []
    waiting: dict[str, str] = {}  # names of calls without a result, by id
    names: dict[str, str] = {}
    for message in messages:
        if calls := message.get("tool_calls"):
            calls = [call if "id" in call else {"id": f"call_{len(names) + place}", **call}
                     for place, call in enumerate(calls)]  # fmt: skip
            made = {call["id"]: call["function"]["name"] for call in calls}
            waiting |= made
            names |= made
            linked.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            identity = _call_of(message, waiting, names)
            if identity is None:
                said = (
                    f"tool_call_id is {message.get('tool_call_id')!r}" if "tool_call_id" in message else "no call waits"
                )
                raise problem(row, field, f"a tool's message is the result of no call before it ({said})")
            waiting.pop(identity, None)
            linked.append({**message, "tool_call_id": identity, "name": message.get("name") or names[identity]})
        else:
            linked.append(message)
    return linked


def _call_of(message: Message, waiting: Mapping[str, str], names: Mapping[str, str]) -> str | None:
    if "tool_call_id" in message:
        return message["tool_call_id"] if message["tool_call_id"] in names else None
    wanted = message.get("name")
    alike = (identity for identity, name in waiting.items() if name == wanted)
    return next(alike, None) or next(iter(waiting), None)


def _from_json(value: Any) -> Any:
    """Return what a text is the JSON of; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
