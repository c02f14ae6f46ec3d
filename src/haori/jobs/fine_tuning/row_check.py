"""Reads every row of a training file as training will, so that what is wrong with one is said when it is uploaded."""

from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from haori.core.errors import DataError
from haori.core.records import Record
from haori.data.conversation import Conversation, said
from haori.data.reading import Tally, stream_rows
from haori.data.section import TextSection
from haori.data.sources import Source

__all__ = ["RowSummary", "check_rows", "source_of"]

_PREFERENCE = ({"chosen", "rejected"}, {"preferred_output", "non_preferred_output"})
_LOOKED_AT = 100  # rows whose columns say what kind of file it is


class RowSummary(Record):
    """What is in a training file."""

    kind: Literal["text", "preference"] = Field(description="Conversations, or pairs of which one is preferred.")
    format: str = Field(description="Row format, as the data layer calls it.")
    rows: int = Field(description="Rows that can be learnt from.")
    read: int = Field(description="Rows in the file.")
    duplicates: int = 0
    empty: int = 0
    characters: int = Field(description="Length of all texts, of which tokens are estimated.")
    notes: tuple[str, ...] = Field(default=(), description="What a user should know, as sentences.")


def source_of(path: Path, filename: str) -> Source:
    """Return a file as rows, called in messages as its owner called it."""
    return Source(filename, files=((path, filename),))


def check_rows(path: Path, filename: str) -> RowSummary:
    """Read every row.

    Args:
        path: The file; its name ends in .jsonl.
        filename: What messages call it.

    Raises:
        DataError: A row is not as it should be; file, row and field are named.
    """
    if not path.stat().st_size:
        raise DataError(f"{filename!r} is empty; a training file has one JSON object a line.")
    source = source_of(path, filename)
    columns: set[str] = set()
    for row in islice(source.rows(), _LOOKED_AT):
        if row.problem is not None:
            raise row.problem
        columns |= {name.strip().lower() for name in row.values}
    return _preferences(source) if any(pair <= columns for pair in _PREFERENCE) else _texts(source)


def _texts(source: Source) -> RowSummary:
    tally, length = Tally(), 0
    for row in stream_rows(TextSection(path=source.name), source, tally):
        length += _length(row)
    return _summary("text", source, tally, length)


def _preferences(source: Source) -> RowSummary:
    from haori.tasks.preference.reading import PreferenceReader
    from haori.tasks.preference.recipe import PreferenceData

    tally, length = Tally(), 0
    reader = PreferenceReader(PreferenceData(path=source.name), one_by_one=False)
    for pair in reader.stream(source, tally):
        length += sum(
            _length(side) for side in (getattr(pair, "chosen", None), getattr(pair, "rejected", None)) if side
        )
    return _summary("preference", source, tally, length)


def _summary(kind: Literal["text", "preference"], source: Source, tally: Tally, length: int) -> RowSummary:
    counts = tally.counts
    if not counts["kept"]:
        why = ", ".join(f"{counts[name]} {name}" for name in ("empty", "duplicates") if counts[name])
        raise DataError(
            f"{source.name!r} has no row to learn from: of {counts['read']} read, {why or 'none is usable'}."
        )
    notes: Any = tally.notes(source)
    return RowSummary(
        kind=kind, format="+".join(sorted(tally.formats)), rows=counts["kept"], read=counts["read"],
        duplicates=counts["duplicates"], empty=counts["empty"], characters=length,
        notes=(*tally.problems, *notes),
    )  # fmt: skip


def _length(row: Conversation) -> int:
    return len(row.text or "") + sum(len(said(message)) for message in row.messages)
