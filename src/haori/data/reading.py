"""From a data section to clean conversations, as a stream, with everything that was dropped counted.

Needs no tokenizer, so length plays no part here. The rows are gone through twice: once for the columns of each file,
once to convert them. One 16-byte hash per row is kept in memory to find duplicates.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from haori.core.errors import DataError
from haori.core.hashing import hash_parts
from haori.data.cleaning import clean_row, empty_turns, is_empty, without_loss
from haori.data.columns import FileColumns, survey
from haori.data.conversation import Conversation
from haori.data.formats import Converter, converter_for, fits_another
from haori.data.messages import MessageReader
from haori.data.progress import tracked
from haori.data.readers import RawRow
from haori.data.report import ReadReport
from haori.data.row_problem import problem
from haori.data.section import TextSection
from haori.data.selection import measuring_source
from haori.data.sources import Source

__all__ = ["PROBLEMS_LISTED", "Tally", "explain_nothing", "read_conversations", "stream_rows"]

PROBLEMS_LISTED = 20
_LISTED = 20


@dataclass
class Tally:
    """What a reading has met so far."""

    counts: Counter[str] = field(default_factory=Counter)
    formats: set[str] = field(default_factory=set)
    unused: Counter[str] = field(default_factory=Counter)
    reader: MessageReader = field(default_factory=MessageReader)
    problems: list[str] = field(default_factory=list)

    def add_problem(self, problem: str) -> None:
        """Keep a problem, up to the number that is listed."""
        if len(self.problems) < PROBLEMS_LISTED:
            self.problems.append(problem)

    def notes(self, source: Source) -> list[str]:
        """Say what was left aside without being an error."""
        notes = list(source.remarks)
        if self.unused:
            notes.append(f"Columns not used: {_counted(self.unused, 'row')}.")
        if self.reader.unused:
            notes.append(f"Fields of messages not used: {_counted(self.reader.unused, 'message')}.")
        if self.reader.masked:
            notes.append(f"Answers kept as context by their flags: {_counted(self.reader.masked, 'message')}.")
        for role, then in (("assistant", "kept as context and not trained"), ("user", "kept as they are")):
            if count := self.counts[f"empty_{role}"]:
                notes.append(f"Turns of the {role} without text, {then}: {count:,}.")
        if source.ignored:
            shown = ", ".join(source.ignored[:5]) + (" ..." if len(source.ignored) > 5 else "")
            notes.append(f"Files of the folder not read: {shown} ({len(source.ignored)}).")
        return notes


def _counted(found: Counter[str], what: str) -> str:
    listed = [f"{name} ({count:,} {what}{'s' if count > 1 else ''})" for name, count in sorted(found.items())]
    return ", ".join(listed[:_LISTED]) + (f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else "")


def stream_rows(
    section: TextSection, source: Source, tally: Tally, *, tolerant: bool = False, limit: int | None = None
) -> Iterator[Conversation]:
    """Yield the clean, distinct rows of a source and count the others in `tally`.

    Args:
        section: Format, columns and system message.
        source: Where the rows are.
        tally: Counts `read`, `empty`, `duplicates`, `broken`, `control_characters` and `kept`.
        tolerant: Note broken rows as problems and go on, instead of raising.
        limit: Read at most this many rows.

    Raises:
        DataError: A row or file cannot be understood (a row only when not `tolerant`).
    """
    seen: set[bytes] = set()
    total = source.size_bytes or None
    columns = survey(tracked(source.rows(limit), "Looking at columns", total=total, size="done"))
    converters: dict[str, Converter] = {}
    for raw in tracked(source.rows(limit), "Reading", total=total, size="done"):
        tally.counts["read"] += 1
        try:
            if raw.problem is not None:
                raise raw.problem
            if raw.file not in converters:
                converters[raw.file] = _converter(section, raw.file, columns.get(raw.file, FileColumns()), tally)
            row = converters[raw.file](raw)
        except DataError as error:
            if not tolerant or (raw.problem is None and raw.file not in converters):
                raise
            tally.counts["broken"] += 1
            tally.add_problem(str(error))
            continue
        row, dirty = clean_row(row)
        tally.counts["control_characters"] += dirty
        if is_empty(row):
            tally.counts["empty"] += 1
            continue
        row = _without_empty_turns(row, section, tally).with_system(section.system)
        digest = hashlib.sha256(row.hash.encode()).digest()[:16]
        if digest in seen:
            tally.counts["duplicates"] += 1
            continue
        seen.add(digest)
        tally.counts["kept"] += 1
        yield row


def _converter(section: TextSection, file: str, columns: FileColumns, tally: Tally) -> Converter:
    """Choose how the rows of a file are converted, and note what will not be used of them."""
    if section.columns is not None:
        name, used, convert = converter_for(section, columns.held, file, tally.reader)
        tally.unused += columns.unused_exactly(used)
        tally.formats.add(name)
        return convert
    names = columns.filled()
    try:
        name, used, convert = converter_for(section, names, file, tally.reader)
    except DataError:  # a column that it takes may be there and blank throughout
        name, used, convert = converter_for(section, columns.names(), file, tally.reader)
    tally.unused += columns.unused(used)
    tally.formats.add(name)

    def converted(raw: RawRow) -> Conversation:
        if columns.varied:
            raw = columns.respelt(raw, used)
        if (other := fits_another(name, used, raw)) is not None:
            raise problem(raw, sorted(used)[0], f"the file is read as {name}, and this row is {other}; give each "
                          "format a file of its own")  # fmt: skip
        return convert(raw)

    return converted


def _without_empty_turns(row: Conversation, section: TextSection, tally: Tally) -> Conversation:
    """Count turns without text; a model is not taught to say nothing, unless every token is to be trained."""
    places = empty_turns(row)
    for place in places:
        role = row.messages[place]["role"]
        tally.counts[f"empty_{role}"] += 1
        tally.add_problem(f"{row.origin}: turn {place + 1}, the {role}'s, has no text.")
    return without_loss(row, places) if places and section.train_on == "assistant" else row


def read_conversations(section: TextSection) -> tuple[list[Conversation], ReadReport]:
    """Read and clean all rows of `section.path`; for evaluation, so nothing is split and no length is checked.

    Raises:
        DataError: The data cannot be found or understood, or no row is left after cleaning.
    """
    source = measuring_source(section)
    tally = Tally()
    rows = list(stream_rows(section, source, tally, limit=section.max_rows))
    if not rows:
        raise DataError(explain_nothing(section.path, tally.counts))
    report = ReadReport(
        source=section.path,
        format="+".join(sorted(tally.formats)),
        hash=hash_parts(row.hash for row in rows),
        problems=tuple(tally.problems),
        notes=tuple(tally.notes(source)),
        licence=section.licence,
        attribution=section.attribution,
        **{
            name: tally.counts[name] for name in ("read", "kept", "empty", "duplicates", "broken", "control_characters")
        },
    )
    return rows, report


def explain_nothing(path: str, counts: Counter[str]) -> str:
    """Say why no row is left."""
    if not counts["read"]:
        return f"{path!r} has no rows."
    words = {"empty": "empty", "duplicates": "duplicates", "broken": "broken", "too_long": "too long",
             "untrained": 'without an answer to learn (all say "loss": false)'}  # fmt: skip
    why = ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key])
    return f"{path!r} has no row to use: of {counts['read']} read, {why or 'none was kept'}."
