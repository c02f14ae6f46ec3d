"""Text data: from files to a validated, cleaned, split, tokenised and hashed dataset.

Knows nothing about models, adapters or training; it takes a tokenizer where it needs one. Importing this
package is light: the names below are loaded when they are first used. Pictures have a package of their own in it.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

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

__getattr__ = lazy_exports(
    __name__,
    {
        "control_tokens": ("ControlTokens",),
        "conversation": ("Conversation", "Message"),
        "prompt_format": ("PromptFormat",),
        "reading": ("read_conversations",),
        "rendered_row": ("RenderedRow", "render_row", "render_row_prompt"),
        "report": ("DataReport", "ReadReport"),
        "reviews": ("ReviewData", "fetch_reviews"),
        "show": ("report_table", "sample_panels"),
        "template": ("render_prompt", "template_hash", "template_of"),
        "text": ("TextData", "check_text", "load_text"),
        "tool_prompt": ("render_tool_prompt",),
    },
)
