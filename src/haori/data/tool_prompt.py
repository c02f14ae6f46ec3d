"""Tools, calls and their results in a prompt.

A chat template that knows tools writes them itself. For one that does not, they are put into words: the functions into
the system message, each call as JSON into the assistant's turn, each result into a turn of the user. Nothing that was
given is left out of the prompt: a template that would do so is refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.data.control_tokens import ControlTokens, encode_marked, mark_control_tokens
from haori.data.template import apply_template, for_template, template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Turn", "apart_for_template", "render_tool_prompt", "shown_turns"]

Turn = Mapping[str, Any]
"""A turn as templates expect it: `role`, `content`, and of a call `tool_calls` with `arguments` as an object, of a
result `tool_call_id` and `name`."""

_PROBE = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A letter."}}},
    },
}
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_OF_TOOLS = frozenset({"tool_calls", "tool_call_id", "name"})
_HOW = (
    'To call one, answer with JSON alone: {"name": its name, "arguments": {...}}. To call several, answer with a list '
    "of such objects."
)


def render_tool_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Sequence[Turn],
    tools: Sequence[Mapping[str, Any]],
    control_tokens: ControlTokens = "text",
) -> list[int]:
    """Return the ids of a prompt with tools, calls or results in it.

    Args:
        tokenizer: The base's.
        turns: The conversation, oldest turn first.
        tools: Functions as JSON schemas, in OpenAI's form.
        control_tokens: How control tokens in turns and tools are read.

    Raises:
        DataError: The template refuses the conversation, or leaves a part of it out.
    """
    turns = [mark_control_tokens(tokenizer, turn, control_tokens) for turn in turns]
    tools = [mark_control_tokens(tokenizer, tool, control_tokens) for tool in tools]
    turns, tools = shown_turns(tokenizer, turns, tools)
    return encode_marked(tokenizer, apply_template(tokenizer, turns, tools=tools))


def shown_turns(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]]]:
    """Return turns and tools such that the template, given them, shows all of them.

    Raises:
        DataError: The template refuses the conversation, or leaves a part of it out.
    """
    if not _knows_tools(tokenizer):
        return _in_words(tokenizer, for_template(tokenizer, turns), tools), ()
    if "[TOOL_CALLS]" in template_of(tokenizer):
        turns = [_with_short_ids(turn) for turn in turns]
    return for_template(tokenizer, _as_shown(tokenizer, turns, tools)), tools


def apart_for_template(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Turn], int]:
    """Return a whole conversation in as many turns as the template needs, and how many texts this put apart.

    Each answer of what is returned has the prompt that a request has; a text put apart is marked as not trained, for
    an answer that ends with it would never come to its call.

    Raises:
        DataError: The template refuses the conversation, or leaves a part of it out.
    """
    if not _knows_tools(tokenizer):
        return turns, 0
    if "[TOOL_CALLS]" in template_of(tokenizer):
        turns = [_with_short_ids(turn) for turn in turns]
    shown = _as_shown(tokenizer, turns, tools)
    beside = [sum(bool(turn.get("tool_calls") and turn["content"]) for turn in form) for form in (turns, shown)]
    return shown, beside[0] - beside[1]


def _knows_tools(tokenizer: "PreTrainedTokenizerBase") -> bool:
    turns = [{"role": "user", "content": "x"}]
    return apply_template(tokenizer, turns) != apply_template(tokenizer, turns, tools=[_PROBE])


def _as_shown(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> Sequence[Turn]:
    """Return the turns so that the template shows all of them: as they are, or in more turns that say the same."""
    left_out: list[str] = []
    refused: DataError | None = None
    for form in (turns, _text_apart(turns), _one_by_one(turns), _text_apart(_one_by_one(turns))):
        try:
            missing = _left_out(tokenizer, form, tools)
        except DataError as error:
            refused = refused or error
            continue
        if not missing:
            return form
        left_out = left_out or missing
    if not left_out and refused is not None:
        raise refused
    raise DataError(
        f"The chat template of this base leaves the {' and the '.join(left_out)} of tools out of the prompt; take them "
        "out, or write them as text into other turns."
    )


def _left_out(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say what the template would not show, by words in the place of calls and results that are nowhere else."""
    words: dict[str, str] = {}
    marked: list[Turn] = []
    for i, turn in enumerate(turns):
        new = dict(turn)
        calls = turn.get("tool_calls") or ()
        if calls:
            places = [f"{i}x{j}z" for j in range(len(calls))]
            words |= {f"zqcall{at}": "calls" for at in places} | {f"zqargument{at}": "arguments" for at in places}
            new["tool_calls"] = [
                {**call, "function": {"name": f"zqcall{at}", "arguments": {f"zqargument{at}": 1}}}
                for call, at in zip(calls, places, strict=True)
            ]
        if turn["content"] and (calls or turn["role"] == "tool"):
            new["content"] = f"zqtext{i}z"
            words[new["content"]] = "results" if turn["role"] == "tool" else "texts beside calls"
        marked.append(new)
    text = apply_template(tokenizer, for_template(tokenizer, marked), tools=tools)
    return list(dict.fromkeys(what for word, what in words.items() if word not in text))


def _text_apart(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with what is said beside calls in turns of their own."""
    apart: list[Turn] = []
    for turn in turns:
        if turn.get("tool_calls") and turn["content"]:
            said = {"role": turn["role"], "content": turn["content"], "loss": False}
            apart += [said, {**turn, "content": ""}]
        else:
            apart.append(turn)
    return apart


def _one_by_one(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with several calls as several turns, each with its result behind it."""
    results = [turn for turn in turns if turn["role"] == "tool"]
    single: list[Turn] = []
    for turn in turns:
        if turn["role"] == "tool":
            continue
        calls = turn.get("tool_calls") or ()
        for place, call in enumerate(calls):
            rest = {**turn, "content": ""} if place else dict(turn)
            if place:
                rest.pop("reasoning_content", None)
            single.append({**rest, "tool_calls": [call]})
            found = [result for result in results if result["tool_call_id"] == call["id"]]
            results = [result for result in results if result["tool_call_id"] != call["id"]]
            single += found
        if not calls:
            single.append(turn)
    return single


def _with_short_ids(turn: Turn) -> Turn:
    """Return the turn with ids of nine letters and digits, as templates of Mistral demand."""
    changed = dict(turn)
    if turn.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in turn["tool_calls"]]
    if turn.get("tool_call_id"):
        changed["tool_call_id"] = _short_id(turn["tool_call_id"])
    return changed


def _short_id(identity: str) -> str:
    return identity if _SHORT_ID.fullmatch(identity) else hashlib.sha256(identity.encode()).hexdigest()[:9]


def _in_words(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    plain = _plain_turns(turns)
    if not tools:
        return plain
    functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = "\n".join(["You can call these functions:", *functions, _HOW])
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    told = [{"role": "system", "content": text}, *plain]
    try:
        apply_template(tokenizer, told)
    except DataError:  # some templates take no system message: the user says it
        if plain[0]["role"] != "user":
            raise
        return [{"role": "user", "content": f"{text}\n\n{plain[0]['content']}"}, *plain[1:]]
    return told


def _plain_turns(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Return the turns with calls and results as text; results and what the user says next are one turn."""
    plain: list[dict[str, Any]] = []
    after_result = False
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if calls := turn.get("tool_calls"):
            said = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
            written = json.dumps(said if len(said) > 1 else said[0], ensure_ascii=False)
            content = f"{content}\n{written}" if content else written
        if role == "tool":
            role, content = "user", f"{turn.get('name') or 'The function'} returned: {content}"
        if after_result and role == "user":
            plain[-1]["content"] += f"\n\n{content}"
        else:
            rest = {name: part for name, part in turn.items() if name not in _OF_TOOLS}
            plain.append({**rest, "role": role, "content": content})
        after_result = turn["role"] == "tool" or (after_result and role == "user")
    return plain
