"""Text data: from files to a validated, cleaned, split, tokenised and hashed dataset.

Knows nothing about models, adapters or training; it takes a tokenizer where it needs one. Importing this
package is light: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.data.control_tokens import ControlTokens
    from haori.data.conversation import Conversation, Message
    from haori.data.prompt_format import PromptFormat
    from haori.data.reading import read_conversations
    from haori.data.rendered_row import RenderedRow, render_row, render_row_prompt
    from haori.data.report import DataReport, ReadReport
    from haori.data.reviews import ReviewData, fetch_reviews
    from haori.data.show import report_table, sample_panels
    from haori.data.template import render_prompt, template_hash, template_of
    from haori.data.text import TextData, check_text, load_text
    from haori.data.tool_prompt import render_tool_prompt

_HOMES = {
    "ControlTokens": "control_tokens",
    "Conversation": "conversation",
    "DataReport": "report",
    "Message": "conversation",
    "PromptFormat": "prompt_format",
    "ReadReport": "report",
    "RenderedRow": "rendered_row",
    "ReviewData": "reviews",
    "TextData": "text",
    "check_text": "text",
    "fetch_reviews": "reviews",
    "load_text": "text",
    "read_conversations": "reading",
    "render_prompt": "template",
    "render_row": "rendered_row",
    "render_row_prompt": "rendered_row",
    "render_tool_prompt": "tool_prompt",
    "report_table": "show",
    "sample_panels": "show",
    "template_hash": "template",
    "template_of": "template",
}

__all__ = [
    "ControlTokens",
    "Conversation",
    "DataReport",
    "Message",
    "PromptFormat",
    "ReadReport",
    "RenderedRow",
    "ReviewData",
    "TextData",
    "check_text",
    "fetch_reviews",
    "load_text",
    "read_conversations",
    "render_prompt",
    "render_row",
    "render_row_prompt",
    "render_tool_prompt",
    "report_table",
    "sample_panels",
    "template_hash",
    "template_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
