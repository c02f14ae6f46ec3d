"""From a data section to clean labelled rows, as a stream, with everything that was dropped counted."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from haori.core.errors import DataError
from haori.core.hashing import hash_parts
from haori.core.records import DataReference
from haori.data.columns import FileColumns, survey
from haori.data.conversation import normalise
from haori.data.progress import tracked
from haori.data.readers import RawRow, shorten
from haori.data.reading import Tally, explain_nothing
from haori.data.selection import measuring_source
from haori.data.sources import Source
from haori.tasks.classification.columns import Converted, form_of
from haori.tasks.classification.label_names import LabelNames
from haori.tasks.classification.labelled_row import LabelledRow
from haori.tasks.classification.recipe import ClassificationData

__all__ = ["Reading", "read_rows", "stream_rows"]

_EXAMPLES = 3
_DROPPED = {"empty": "without text or label", "duplicates": "exact duplicates"}


@dataclass
class Reading:
    """What a reading has met so far.

    Attributes:
        tally: Counts of rows.
        problems: What the rows of the files are: of texts with one label, of texts with several, of words.
        names: What the dataset calls its labels, in its order.
        conflicts: The labels that each text came with.
        contradicted: Rows whose text came before with another label.
        examples: A few of them, in words.
    """

    tally: Tally = field(default_factory=Tally)
    problems: Counter[str] = field(default_factory=Counter)
    names: tuple[str, ...] | None = None
    conflicts: dict[bytes, set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))
    examples: list[str] = field(default_factory=list)
    contradicted: int = 0

    def notes(self) -> list[str]:
        """Say what a user should know of labels that contradict one another."""
        if not self.contradicted:
            return []
        shown = "; ".join(self.examples)
        return [f"Rows whose text came before with another label, all kept: {self.contradicted:,} ({shown})."]


def stream_rows(
    section: ClassificationData,
    source: Source,
    reading: Reading,
    *,
    tolerant: bool = False,
    limit: int | None = None,
) -> Iterator[LabelledRow]:
    """Yield the clean, distinct rows of a source and count the others.

    Args:
        section: Columns and names of labels.
        source: Where the rows are.
        reading: Counts `read`, `empty`, `duplicates`, `broken`, `control_characters` and `kept`.
        tolerant: Note broken rows as problems and go on, instead of raising.
        limit: Read at most this many rows.

    Raises:
        DataError: A row or file cannot be understood (a row only when not `tolerant`).
    """
    tally, counts = reading.tally, reading.tally.counts
    seen: set[bytes] = set()
    total = source.size_bytes or None
    columns = survey(tracked(source.rows(limit), "Looking at columns", total=total, size="done"))
    readers: dict[str, _FileReader] = {}
    for raw in tracked(source.rows(limit), "Reading", total=total, size="done"):
        counts["read"] += 1
        try:
            if raw.problem is not None:
                raise raw.problem
            if raw.file not in readers:
                readers[raw.file] = reader = _FileReader(section, source, raw.file, columns[raw.file])
                tally.formats.add(reader.form.name)
                tally.unused += columns[raw.file].unused(reader.form.used)
                reading.names = reading.names or reader.names.numbered
            reader = readers[raw.file]
            found = reader.read(raw)
        except DataError as error:
            if not tolerant or (raw.problem is None and raw.file not in readers):
                raise
            counts["broken"] += 1
            tally.add_problem(str(error))
            continue
        if found is None or found.row.is_empty:
            counts["empty"] += 1
            continue
        row = found.row
        counts["control_characters"] += found.dirty
        digest = hashlib.sha256(row.hash.encode()).digest()[:16]
        if digest in seen:
            counts["duplicates"] += 1
            continue
        seen.add(digest)
        counts["kept"] += 1
        reading.problems[reader.form.problem or ("single_label" if len(row.labels) == 1 else "multi_label")] += 1
        _note_conflict(reading, row)
        yield row


class _FileReader:
    """Reads the rows of one file."""

    def __init__(self, section: ClassificationData, source: Source, file: str, columns: FileColumns) -> None:
        self.form = form_of(section, columns, file)
        self.names = LabelNames.of(section, source, file, self.form.used)
        self._one = section.problem == "single_label"
        self._columns = columns if columns.varied and section.columns is None else None

    def read(self, raw: RawRow) -> Converted | None:
        found = self.form.convert(self._columns.respelt(raw, self.form.used) if self._columns is not None else raw)
        if found is None:
            return None
        if self._one and len(found.row.labels) != 1:
            raise DataError(
                f"{raw.origin}: the row has {len(found.row.labels)} labels, but data.problem is 'single_label'; give "
                "each row one, or set data.problem=multi_label."
            )
        return found._replace(row=self.names.named(found.row))


def read_rows(section: ClassificationData) -> tuple[list[LabelledRow], DataReference, tuple[str, ...]]:
    """Read and clean all rows to measure on, with what a user should know of the reading.

    Raises:
        DataError: The data cannot be found or understood, or no row is left after cleaning.
    """
    source, reading = measuring_source(section), Reading()
    rows = list(stream_rows(section, source, reading, limit=section.max_rows))
    counts = reading.tally.counts
    if not rows:
        raise DataError(explain_nothing(section.path, counts))
    dropped = ", ".join(f"{counts[name]:,} {what}" for name, what in _DROPPED.items() if counts[name])
    reference = DataReference(
        source=section.path,
        hash=hash_parts(row.hash for row in rows),
        format="+".join(sorted(reading.tally.formats)),
        rows={"all": len(rows)},
        licence=section.licence,
        attribution=section.attribution,
    )
    notes = [f"Rows dropped: {dropped}."] if dropped else []
    return rows, reference, (*notes, *reading.tally.notes(source), *reading.notes())


def _note_conflict(reading: Reading, row: LabelledRow) -> None:
    key = hashlib.sha256(normalise(row.body).encode("utf-8", "surrogatepass")).digest()[:16]
    known = reading.conflicts[key]
    if known and row.labels not in known:
        reading.contradicted += 1
        if len(reading.examples) < _EXAMPLES:
            both = " and ".join(_said(labels) for labels in (next(iter(known)), row.labels))
            reading.examples.append(f"{row.origin}, {both}: {shorten(row.body, 60)}")
    known.add(row.labels)


def _said(labels: Sequence[str]) -> str:
    return shorten(" ".join(labels), 40) or "no label"
