r"""Row formats of preferences: which columns a row has, and what it says is preferred.

    pairs    chosen, rejected, and prompt? where they are answers    (TRL, UltraFeedback; texts or lists of messages)
             chosen, rejected as "\n\nHuman: ...\n\nAssistant: ..."  (Anthropic's HH)
             input: {messages, tools?}, preferred_output, non_preferred_output   (OpenAI)
    rated    prompt, completions, scores                             (lists of equal length)
             prompt, completions: [{response, overall_score}]        (UltraFeedback as it was collected)
             prompt, completion, score                               (a row for each answer)
    judged   prompt, completion, label                               (true or false; TRL's unpaired preferences)

`system` and `tools` may stand beside any. Column names are compared without case. What is not as it should be is a
`DataError` that names file, row and field.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from haori.core.errors import DataError, nearest
from haori.data.conversation import Conversation, Message
from haori.data.messages import MessageReader
from haori.data.readers import RawRow, shorten
from haori.data.row_problem import problem, value_of
from haori.data.tool_rows import link_results, read_tools
from haori.tasks.preference.recipe import PreferenceData

__all__ = ["Answered", "RowReader", "row_reader"]

_NAMES = {
    "chosen": ("chosen", "chosen_response", "preferred_output"),
    "rejected": ("rejected", "rejected_response", "non_preferred_output"),
    "chosen_score": ("score_chosen", "chosen_score", "chosen_rating", "chosen-rating"),
    "rejected_score": ("score_rejected", "rejected_score", "rejected_rating", "rejected-rating"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "completions": ("completions", "responses", "answers", "generations"),
    "scores": ("scores", "ratings"),
    "completion": ("completion", "response", "answer", "output"),
    "label": ("label",),
    "score": ("score", "rating"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
}
_KINDS = {
    "pairs": ({"chosen", "rejected"},),
    "rated": ({"prompt", "completions"}, {"prompt", "completion", "score"}),
    "judged": ({"prompt", "completion", "label"},),
}
_OPTIONAL = {
    "pairs": {"prompt", "chosen_score", "rejected_score", "system", "tools"},
    "rated": {"scores", "system", "tools"},
    "judged": {"system", "tools"},
}
_KNOWN = (
    "chosen + rejected (and prompt); prompt + completions + scores; prompt + completion + score; "
    "prompt + completion + label"
)
_TEXTS = ("response", "completion", "text", "content", "answer")
_SCORES = ("overall_score", "score", "rating", "fine-grained_score")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")
_TRUE = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 and 0 equal them


class Answered(NamedTuple):
    """One conversation of a row with what is said of its last answer."""

    row: Conversation
    score: float | None = None
    desirable: bool | None = None


@dataclass
class RowReader:
    """Reads the rows of one file.

    Attributes:
        kind: `pairs`, `rated` or `judged`.
        columns: Which column plays which part.
        messages: Reads messages and counts what it meets.
    """

    kind: str
    columns: Mapping[str, str]
    messages: MessageReader = field(default_factory=MessageReader)

    @property
    def alone(self) -> bool:
        """Say whether a row holds one of the scored answers to a prompt."""
        return self.kind == "rated" and "completion" in self.columns

    def read(self, row: RawRow) -> list[Answered]:
        """Return the answers of a row: of pairs the chosen one first.

        Raises:
            DataError: Something in it is not as it should be.
        """
        if self.kind == "pairs":
            return self._pair(row)
        prompt = self._prompt(row)
        assert prompt is not None
        if "completions" in self.columns:
            return self._rated(row, prompt)
        column = self.columns["completion"]
        whole = self._whole(row, prompt, self._turns(row, column), column)
        if self.kind == "judged":
            return [Answered(whole, desirable=_truth(row, self.columns["label"]))]
        return [Answered(whole, score=_number(row, self.columns["score"], row.values.get(self.columns["score"])))]

    def _pair(self, row: RawRow) -> list[Answered]:
        prompt = self._prompt(row)
        found: list[Answered] = []
        for side in ("chosen", "rejected"):
            column = self.columns[side]
            turns = self._turns(row, column, dialogue=prompt is None)
            if prompt is None and turns and turns[0]["role"] == "assistant":
                if "prompt" not in self.columns:
                    raise problem(
                        row, column, "an answer without its prompt; put the prompt into a column of that name"
                    )
                turns = [Message(role="user", content=""), *turns]  # asked nothing: the row is counted as empty
            score = self.columns.get(f"{side}_score")
            given = row.values.get(score) if score is not None else None
            found.append(
                Answered(
                    self._whole(row, prompt, turns, column),
                    score=None if given is None or score is None else _number(row, score, given),
                )
            )
        return found

    def _rated(self, row: RawRow, prompt: list[Message]) -> list[Answered]:
        column = self.columns["completions"]
        given = row.values.get(column)
        if not isinstance(given, list) or not given:
            raise problem(row, column, "this must be a list of answers")
        if "scores" in self.columns:
            scores, place = row.values.get(self.columns["scores"]), self.columns["scores"]
            if not isinstance(scores, list) or len(scores) != len(given):
                count = len(scores) if isinstance(scores, list) else "none"
                raise problem(row, place, f"there are {len(given)} answers and {count} scores; give each one")
            numbers = [_number(row, f"{place}[{i}]", score) for i, score in enumerate(scores)]
        else:
            numbers = [self._own_score(row, f"{column}[{i}]", item) for i, item in enumerate(given)]
        answers: list[Answered] = []
        for i, (item, score) in enumerate(zip(given, numbers, strict=True)):
            name = f"{column}[{i}]"
            turns = self._turns(RawRow(row.origin, row.file, {name: _text_of(item)}), name)
            answers.append(Answered(self._whole(row, prompt, turns, name), score=score))
        return answers

    def _own_score(self, row: RawRow, place: str, item: Any) -> float:
        key = next((key for key in _SCORES if isinstance(item, dict) and item.get(key) is not None), None)
        if key is None:
            raise problem(row, place, "no score goes with this answer; give a column of scores, one for each answer")
        return _number(row, f"{place}.{key}", item[key])

    def _prompt(self, row: RawRow) -> list[Message] | None:
        """Return the turns of the prompt; None where there is no column or nothing in it."""
        column = self.columns.get("prompt")
        if column is None or (self.kind == "pairs" and row.values.get(column) in (None, "", [])):
            return None
        value = value_of(row, column)
        if isinstance(value, str):
            turns = _dialogue(value)
            return turns[:-1] if turns and _is_open(turns) else [Message(role="user", content=value)]
        if isinstance(value, dict):
            row, column = self._unwrapped(row, column, value)
        return self.messages.messages(row, column)

    def _unwrapped(self, row: RawRow, column: str, value: dict[str, Any]) -> tuple[RawRow, str]:
        """Return the messages of an object that stands for a request, as OpenAI writes a prompt."""
        if "messages" not in value:
            raise problem(row, column, 'an object must hold "messages", a list of {role, content}')
        self.messages.unused.update(f"{column}.{name}" for name in value if name not in {"messages", "tools"})
        name = f"{column}.messages"
        return RawRow(row.origin, row.file, {name: value["messages"]}), name

    def _tools(self, row: RawRow) -> tuple[dict[str, Any], ...]:
        """Return the tools of a row, which may stand in the object that holds its prompt."""
        if "tools" in self.columns:
            return read_tools(row, self.columns["tools"])
        column = self.columns.get("prompt", "")
        held = row.values.get(column)
        if not isinstance(held, dict) or "tools" not in held:
            return ()
        return read_tools(RawRow(row.origin, row.file, {f"{column}.tools": held["tools"]}), f"{column}.tools")

    def _turns(self, row: RawRow, column: str, *, dialogue: bool = False) -> list[Message]:
        """Return the turns of an answer or a conversation."""
        value = value_of(row, column)
        if isinstance(value, str) or value is None:
            turns = _dialogue(value or "") if dialogue else None
            return turns or [Message(role="assistant", content=value or "")]
        return self.messages.messages(row, column)

    def _whole(self, row: RawRow, prompt: list[Message] | None, turns: list[Message], column: str) -> Conversation:
        """Put prompt and answer together; a list that has the prompt itself is a whole conversation."""
        if not turns:
            turns = [Message(role="assistant", content="")]
        if turns[-1]["role"] != "assistant":
            raise problem(row, column, f"the last message must be the assistant's, not the {turns[-1]['role']}'s")
        if prompt is not None and turns[0]["role"] in {"assistant", "tool"}:
            turns = [*prompt, *turns]
        elif prompt is not None and not _begins_with(turns, prompt):
            raise problem(row, column, "the conversation does not hold the prompt that stands beside it")
        system = row.values.get(self.columns["system"]) if "system" in self.columns else None
        if isinstance(system, str) and system.strip() and turns[0]["role"] != "system":
            turns = [Message(role="system", content=system), *turns]
        return Conversation(tuple(link_results(row, column, turns)), row.origin, tools=self._tools(row))


def row_reader(section: PreferenceData, columns: Iterable[str], file: str, messages: MessageReader) -> RowReader:
    """Choose how the rows of a file are read.

    Args:
        section: Its `format` and `columns` come before detection.
        columns: Column names of the file.
        file: The file, for messages.
        messages: Reads messages and counts what it meets.

    Raises:
        DataError: The columns fit no known format, or not the one that was asked for.
    """
    present = list(columns)
    names = {name.strip().lower(): name for name in present}
    parts = {part: names[name] for part, spelt in _NAMES.items() for name in reversed(spelt) if name in names}
    for part, column in (section.columns.model_dump() if section.columns is not None else {}).items():
        if column is not None and column not in present:
            hint = nearest(column, present) or f"the columns are {_listed(present)}."
            raise DataError(f"{file} has no column {column!r} (data.columns.{part}); {hint}")
        if column is not None:
            parts[part] = column
    for kind, needed in _KINDS.items():
        chosen = next((need for need in needed if need <= parts.keys()), None)
        if chosen is not None and section.format in ("auto", kind):
            used = {part: column for part, column in parts.items() if part in chosen | _OPTIONAL[kind]}
            return RowReader(kind, used, messages)
    wanted = "no known format" if section.format == "auto" else f"not the format {section.format!r}"
    raise DataError(
        f"{file} has the columns {_listed(present)}, which fit {wanted} of preferences ({_KNOWN}); "
        "say which is which with data.columns, such as --set data.columns.chosen=NAME."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _dialogue(text: str) -> list[Message] | None:
    """Return the turns of a dialogue in the form of Anthropic's HH data; None for other text."""
    if not text.lstrip().startswith("Human:"):
        return None
    parts = _TURN.split(text.strip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(role=roles[who], content=said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _is_open(turns: list[Message]) -> bool:
    """Say whether a dialogue ends where the assistant is to answer."""
    return len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"]


def _begins_with(turns: list[Message], prompt: list[Message]) -> bool:
    """Say whether a conversation holds the prompt: as its first turns, or as what the user says somewhere."""
    if turns[: len(prompt)] == prompt:
        return True
    said = [turn["content"].strip() for turn in turns if turn["role"] != "assistant"]
    asked = [turn["content"].strip() for turn in prompt if turn["role"] != "assistant"]
    return all(text in said for text in asked)


def _text_of(item: Any) -> Any:
    """Return the answer of an item of a list: a text, messages, or an object that holds one of them."""
    if not isinstance(item, dict) or "role" in item:
        return [item] if isinstance(item, dict) else item
    return next((item[key] for key in _TEXTS if item.get(key) is not None), "")


def _number(row: RawRow, column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise problem(row, column, f"a score must be a number, not {shorten(value, 40)}")
    return number


def _truth(row: RawRow, column: str) -> bool:
    value = value_of(row, column)
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, (bool, int, str)) and key in _TRUE:
        return _TRUE[key]
    raise problem(row, column, f"label must be true or false, not {shorten(value, 40)}")
