"""What a chat template does with the reasoning of a message.

Templates call it by different names, many show none, and some put an empty block where there is none. Only rendering
says what a template does, so each is tried once on a short conversation.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from haori.data.conversation import Conversation
from haori.data.messages import REASONING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ReasoningCount", "reasoning_field"]

_PROBE = "haori looks whether this is shown"
_EMPTY_BLOCK = re.compile(r"<(think|thinking|thought|reasoning)>\s*</\1>")


def reasoning_field(tokenizer: "PreTrainedTokenizerBase", template: str) -> str | None:
    """Return the name under which a template shows the reasoning of a message; None where it shows none."""
    return _behaviour(template, _specials(tokenizer))[0]


class ReasoningCount:
    """Counts, over rows, reasoning that the template of a base does not show, and blocks that it leaves empty."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
        self._field, self._leaves_empty = _behaviour(template, _specials(tokenizer))
        self._unused = self._empty = 0

    def add(self, row: Conversation) -> None:
        """Count a row."""
        trained = [m for m in row.messages if m["role"] == "assistant" and m.get("loss") is not False]
        if self._field is None:
            self._unused += sum("reasoning_content" in message for message in row.messages)
        if self._leaves_empty:
            self._empty += any("reasoning_content" not in message or self._field is None for message in trained[-1:])

    def notes(self) -> Iterable[str]:
        """Say what was counted."""
        if self._unused:
            yield (
                f"Reasoning not used, since this base's chat template shows none: that of {self._unused:,} "
                f"message{'s' if self._unused > 1 else ''}."
            )
        if self._empty:
            yield (
                f"Rows whose answer comes without reasoning: {self._empty:,}; the chat template of this base puts an "
                "empty thinking block before such an answer, which is part of what is learnt."
            )


def _specials(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[str, str], ...]:
    found = tokenizer.special_tokens_map.items()
    return tuple(sorted((name, text) for name, text in found if isinstance(text, str)))


@lru_cache(maxsize=64)
def _behaviour(template: str, specials: tuple[tuple[str, str], ...]) -> tuple[str | None, bool]:
    """Return the name of reasoning in a template, and whether it puts an empty block where there is none."""

    def shown(**extra: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **extra}]
        try:
            texts, _ = render_jinja_template(conversations=[asked], chat_template=template, **dict(specials))
        except Exception:  # noqa: BLE001 - a template is a program: it may raise anything
            return ""
        return str(texts[0])

    field = next((name for name in REASONING if name in template and _PROBE in shown(**{name: _PROBE})), None)
    return field, "<" in template and _EMPTY_BLOCK.search(shown()) is not None
