"""How families of models write calls, as data. A further family is a further row of `_FORMATS`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.data import template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Marks", "ToolFormat", "format_of"]


@dataclass(frozen=True)
class Marks:
    """What a call is put between; `closing` may be empty."""

    opening: str
    closing: str


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        name: The family.
        signs: Texts in a chat template that tell the family.
        marks: What calls are put between when they are read.
        bare: Whether an answer that begins with JSON is a call.
        before: What is written before each call, or before the list of them.
        after: What is written after it.
        between: What is written between calls.
        listed: Whether several calls are a JSON list.
        key: The key of the arguments that is written; both are read.
        short_ids: Whether ids are nine letters and digits.
    """

    name: str
    signs: tuple[str, ...]
    marks: tuple[Marks, ...]
    bare: bool = False
    before: str = ""
    after: str = ""
    between: str = ""
    listed: bool = False
    key: str = "arguments"
    short_ids: bool = False

    def marker_tokens(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
        """Return those of the marks that are one token of their own."""
        wanted = {text for marks in self.marks for text in (marks.opening, marks.closing) if text}
        return {str(entry): token for token, entry in tokenizer.added_tokens_decoder.items() if str(entry) in wanted}


_HERMES = Marks("<tool_call>", "</tool_call>")
_MISTRAL = Marks("[TOOL_CALLS]", "")
_LLAMA = Marks("<|python_tag|>", "")

_FORMATS = (
    ToolFormat("mistral", ("[TOOL_CALLS]",), (_MISTRAL,), before="[TOOL_CALLS]", between=", ", listed=True,
               short_ids=True),
    ToolFormat("hermes", ("<tool_call>",), (_HERMES,), before="<tool_call>\n", after="\n</tool_call>", between="\n"),
    ToolFormat("llama", ("<|python_tag|>", "ipython"), (_LLAMA,), bare=True, between="; ", key="parameters"),
)  # fmt: skip
_JSON = ToolFormat("json", (), (_HERMES, _MISTRAL, _LLAMA), bare=True, between=", ", listed=True)
"""For all other templates. Adapters may have learnt any of the forms, so all are read."""

_UNREAD: Sequence[str] = ("<function=", "[ARGS]", "<|channel|>", "<｜tool▁call", "<|tool_call_begin|>", "<arg_key>")
"""Signs of forms that are not read."""


def format_of(tokenizer: "PreTrainedTokenizerBase") -> ToolFormat:
    """Return how calls are written by models with this chat template.

    Raises:
        InputError: In a form that is not read.
    """
    template = template_of(tokenizer)
    if unread := next((sign for sign in _UNREAD if sign in template), None):
        raise InputError(
            f"Tools cannot be used with this base: its chat template writes calls in a form with {unread!r}, which "
            "this server does not read; ask without 'tools', or use a base with calls in JSON."
        )
    return next((found for found in _FORMATS if any(sign in template for sign in found.signs)), _JSON)
