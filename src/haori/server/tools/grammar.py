"""The grammar that an answer with calls is kept to: the family's form around each function's own schema."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from haori.serve.sampling.constraints import json_rule
from haori.server.tools.formats import ToolFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["calls_grammar"]

_MOST_CALLS = 32
"""In one answer: a model that finds no end must not write calls until its last token."""


def calls_grammar(
    form: ToolFormat,
    schemas: Mapping[str, Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    several: bool,
    otherwise: Mapping[str, Any] | Literal["text"] | None = None,
) -> str:
    """Return the grammar of an answer that calls functions.

    Args:
        form: How calls are written.
        schemas: The arguments of each function that may be called.
        tokenizer: The base's; marks that are one token are written as that token.
        several: Whether there may be more than one call.
        otherwise: What the answer may be instead: JSON that fits a schema, or any text, which calls may follow.

    Raises:
        InputError: A schema cannot be written as JSON.
    """
    calls = _Writer(form, form.marker_tokens(tokenizer))
    rules = [calls.rule(several=several), "call: " + " | ".join(f"call_{i}" for i in range(len(schemas)))]
    for i, (name, schema) in enumerate(schemas.items()):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{form.key}": ')
        rules += [f'call_{i}: {head} arguments_{i} "}}"', f"arguments_{i}: {json_rule(schema)}"]
    if otherwise is None:
        rules.insert(0, "start: calls")
    elif otherwise == "text":
        rules = [calls.start_with_text(), *rules]
    else:
        rules = ["start: calls | otherwise", f"otherwise: {json_rule(otherwise)}", *rules]
    return "\n".join(rules)


class _Writer:
    """Writes the rules around the calls."""

    def __init__(self, form: ToolFormat, tokens: Mapping[str, int]) -> None:
        self._form = form
        self._tokens = tokens

    def rule(self, *, several: bool) -> str:
        """Return the rule of all calls together."""
        form, more = self._form, _MOST_CALLS - 1
        between = json.dumps(form.between)
        if form.listed:
            items = f"call ({between} call){{0,{more}}}" if several else "call"
            alone = "" if form.before else "call | "
            space = '" "?' if form.before else ""  # templates differ
            return f'calls: {alone}{self._text(form.before)} {space} "[" {items} "]"'
        one = f"{self._text(form.before)} call {self._text(form.after)}".strip()
        return f"calls: {one} ({between} {one}){{0,{more}}}" if several else f"calls: {one}"

    def start_with_text(self) -> str:
        """Return the first rules of an answer in which calls may follow text."""
        if self._form.bare:  # JSON at the beginning is a call
            return "start: calls | TEXT |\nTEXT: /[^{\\[ \\t\\r\\n](.|\\n)*/"
        marks = self._form.marks[0]
        if marks.opening in self._tokens:
            return "start: TEXT | TEXT calls | calls |\nTEXT: /(.|\\n)+/"
        body, after = ('" "? "[" call "]"', "") if self._form.listed else ("call", self._form.after)
        inside = self._text(self._form.before.removeprefix(marks.opening))
        return "\n".join([
            f"start: marked{{0,{_MOST_CALLS}}} TEXT",
            f"marked: head {inside} {body} {self._text(after)}",
            f"head[lazy]: TEXT {json.dumps(marks.opening)}",  # from the mark on, the call's form is kept to
            "TEXT: /(.|\\n)*/",
        ])  # fmt: skip

    def _text(self, text: str) -> str:
        """Return text as terminals; a mark that is one token stands for itself."""
        mark = next((mark for mark in self._tokens if mark in text), None)
        if mark is None:
            return json.dumps(text) if text else ""
        before, _, after = text.partition(mark)
        parts = (json.dumps(before) if before else "", f"<[{self._tokens[mark]}]>", json.dumps(after) if after else "")
        return " ".join(part for part in parts if part)
