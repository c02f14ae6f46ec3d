"""What an answer must look like, in vLLM's words: `structured_outputs`, and the older `guided_*`."""

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from haori.server.errors import ApiError
from haori.server.openai.request_fields import RequestPart, SamplingFields

__all__ = [
    "JsonObjectFormat",
    "StructuredFields",
    "StructuredOutputs",
    "TextFormat",
    "choice_grammar",
    "regex_grammar",
]

_ANYTHING = {"type": ["object", "array", "string", "number", "boolean", "null"]}
_UNUSUAL = re.compile(r"\\?[/\n\r]|\\.", re.S)  # in a grammar, a regex stands between slashes on one line
_WRITTEN = {"/": r"\/", "\n": r"\n", "\r": r"\r", r"\d": "[0-9]", r"\D": "[^0-9]"}  # digits as in JSON schemas

Choices = list[str]


class TextFormat(RequestPart):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(RequestPart):
    """Any JSON object."""

    type: Literal["json_object"]


class StructuredOutputs(RequestPart):
    """One of the ways to say what an answer must look like."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "structural_tag": (), "disable_fallback": (), "disable_any_whitespace": (),
        "disable_additional_properties": (), "whitespace_pattern": (),
    }  # fmt: skip

    choice: Choices | None = Field(default=None, min_length=1, description="The answer is one of these.")
    regex: str | None = Field(default=None, min_length=1, description="The whole answer matches; without look-around.")
    grammar: str | None = Field(default=None, min_length=1, description="Lark as llguidance reads it, or GBNF.")
    schema_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(default=None, description="The answer is any JSON object.")


class StructuredFields(SamplingFields):
    """The fields of requests whose answers can be kept to a form."""

    structured_outputs: StructuredOutputs | None = Field(default=None, description="What the answer must look like.")
    guided_choice: Choices | None = Field(default=None, min_length=1, description="The answer is one of these.")
    guided_regex: str | None = Field(default=None, min_length=1, description="The whole answer matches.")
    guided_grammar: str | None = Field(default=None, min_length=1, description="The answer fits this grammar.")
    guided_json: dict[str, Any] | str | None = Field(default=None, description="The answer fits this JSON schema.")

    def structure(self, *others: str) -> dict[str, Any] | None:
        """Return the fields of `Sampling` that say what the answer is kept to; None if nothing does here.

        Args:
            others: Further fields of the request that say so.

        Raises:
            ApiError: Two fields say so, or a schema is none.
        """
        within = self.structured_outputs
        given = {
            "structured_outputs.choice": within and within.choice, "guided_choice": self.guided_choice,
            "structured_outputs.regex": within and within.regex, "guided_regex": self.guided_regex,
            "structured_outputs.grammar": within and within.grammar, "guided_grammar": self.guided_grammar,
            "structured_outputs.json": within and within.schema_, "guided_json": self.guided_json,
            "structured_outputs.json_object": (within and within.json_object) or None,
        }  # fmt: skip
        names = [name for name, value in given.items() if value is not None]
        if within is not None and not any(name.startswith("structured_outputs.") for name in names):
            message = "'structured_outputs' says nothing; give 'choice', 'regex', 'grammar', 'json' or 'json_object'."
            raise ApiError(400, message, param="structured_outputs", code="invalid_value")
        if names and len(names) + len(others) > 1:
            first, second = [*names, *others][:2]
            message = f"{first!r} and {second!r} both say what the answer must look like; give one of them."
            raise ApiError(400, message, param=first, code="invalid_value")
        return _sampling(names[0], given[names[0]]) if names else None


def choice_grammar(choices: Choices) -> str:
    """Return the grammar of an answer that is one of some texts."""
    return "start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))


def regex_grammar(pattern: str) -> str:
    """Return the grammar of an answer that matches a regular expression as a whole."""

    def written(found: re.Match[str]) -> str:
        return _WRITTEN.get(found[0], _WRITTEN.get(found[0][-1], found[0]))

    return f"start: /{_UNUSUAL.sub(written, pattern)}/"


def _sampling(name: str, value: Any) -> dict[str, Any]:
    if name.endswith("choice"):
        return {"grammar": choice_grammar(value)}
    if name.endswith("regex"):
        return {"grammar": regex_grammar(value)}
    if name.endswith("grammar"):
        return {"grammar": value}
    if name.endswith("json_object"):
        return {"json_schema": {}}
    return {"json_schema": _schema(name, value) or _ANYTHING}


def _schema(name: str, value: dict[str, Any] | str) -> dict[str, Any]:
    """Return a schema, which may be given as text."""
    if isinstance(value, dict):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = f"{name!r} cannot be {value[:80]!r}: it must be a JSON schema, as an object or the JSON of one."
        raise ApiError(400, message, param=name, code="invalid_value")
    return found
