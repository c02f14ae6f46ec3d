"""Rows of a training file as the model will see them: token by token, with what is trained."""

from itertools import groupby, islice
from pathlib import Path
from typing import Any

from haori.core.records import Record
from haori.data.reading import Tally, stream_rows
from haori.data.rendered_row import IGNORED, render_row
from haori.data.section import TextSection
from haori.data.tokenise import resolve_max_length
from haori.jobs.fine_tuning.row_check import source_of

__all__ = ["PreviewedRow", "TrainedSpan", "preview"]


class TrainedSpan(Record):
    """Tokens that are trained, from `start` up to but not including `end`, and their text."""

    start: int
    end: int
    text: str


class PreviewedRow(Record):
    """A row, rendered with the base's chat template; labels are -100 where nothing is trained.

    Attributes:
        too_long: Whether it has more tokens than a job takes by default, which leaves such rows out, and counts them.
    """

    origin: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    trained_spans: tuple[TrainedSpan, ...]
    text: str
    too_long: bool


def preview(path: Path, filename: str, tokenizer: Any, count: int, context_length: int) -> list[PreviewedRow]:
    """Render the first rows of a file of conversations.

    Args:
        path: The file.
        filename: What its account calls it.
        tokenizer: Of the base.
        count: How many rows.
        context_length: Of the base, in tokens.

    Raises:
        DataError: A row cannot be rendered.
    """
    longest = resolve_max_length("auto", context_length)
    rows = stream_rows(TextSection(path=filename), source_of(path, filename), Tally())
    return [_previewed(row, tokenizer, longest) for row in islice(rows, count)]


def _previewed(row: Any, tokenizer: Any, longest: int) -> PreviewedRow:
    found = render_row(tokenizer, row)
    spans, place = [], 0
    for trained, run in groupby(found.labels, key=lambda label: label != IGNORED):
        length = len(list(run))
        if trained:
            text = tokenizer.decode(list(found.input_ids[place : place + length]))
            spans.append(TrainedSpan(start=place, end=place + length, text=text))
        place += length
    return PreviewedRow(
        origin=row.origin, input_ids=tuple(found.input_ids), labels=tuple(found.labels), trained_spans=tuple(spans),
        text=tokenizer.decode(list(found.input_ids)), too_long=len(found.input_ids) > longest,
    )  # fmt: skip
