"""Labelled rows as the model reads them, for terminals."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

__all__ = ["sample_panels"]


def sample_panels(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Mapping[str, Any]], count: int
) -> "list[RenderableType]":
    """Return the first rows, each with its labels; a word's label stands behind its first token in [[ ]].

    Args:
        tokenizer: The base's.
        rows: Rows with `input_ids`, `labels`, `row` and `origin`.
        count: How many.
    """
    return [_panel(tokenizer, row) for row in islice(rows, count)]


def _panel(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> "RenderableType":
    from rich.panel import Panel
    from rich.text import Text

    ids, labels = list(row["input_ids"]), list(row["labels"])
    text = Text()
    of_words = '"words"' in row["row"] and len(labels) == len(ids)
    for token, label in zip(ids, labels, strict=True) if of_words else ():
        text.append(f"{tokenizer.decode([token])} ", style="dim" if label is None else "bold")
        if label is not None:
            text.append(f"[[{label}]] ", style="bold underline green")
    if not of_words:
        text.append(tokenizer.decode(ids, skip_special_tokens=False))
        text.append(f"\n[[{', '.join(map(str, labels)) or 'no label'}]]", style="bold underline green")
    title = Text(f"{row['origin']}: {len(ids)} tokens")
    return Panel(text, title=title, subtitle=Text("[[ ]] = label"), title_align="left", subtitle_align="left")
