"""The whole way of labelled data: read, clean, encode, split, check, and keep in Arrow under the cache.

The result is keyed by content (bytes of the sources, settings and tokenizer), so a second run takes it from the cache,
and a changed file never meets an old result. Labels are kept by name.
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import DataError
from haori.core.hashing import hash_data, hash_parts, short
from haori.core.records import DataReference
from haori.core.settings import settings
from haori.core.storage import staged_folder
from haori.core.token_ids import no_embedding
from haori.data.arrow_rows import arrow_rows, keep_report, open_kept, write_arrow
from haori.data.conversation import Conversation
from haori.data.leaks import find_leaks
from haori.data.progress import tracked
from haori.data.reading import explain_nothing
from haori.data.report import Leaks
from haori.data.selection import training_sources
from haori.data.sources import Source
from haori.data.split import points
from haori.data.template import tokenizer_hash
from haori.tasks.classification.encoding import Encoded, TextEncoder
from haori.tasks.classification.label_names import check_labels, order_labels
from haori.tasks.classification.labelled_row import LabelledRow
from haori.tasks.classification.reading import Reading, stream_rows
from haori.tasks.classification.recipe import ClassificationData
from haori.tasks.classification.report import ClassificationReport, report_table
from haori.tasks.classification.splitting import choose_stratified

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import RenderableType

__all__ = ["ClassificationSplit", "load_rows"]

_VERSION = 1  # of everything below; a change makes cached results unknown
_COUNTED = ("read", "empty", "duplicates", "broken", "control_characters", "too_long", "truncated")


@dataclass(frozen=True)
class ClassificationSplit:
    """Labelled rows ready for training.

    Both parts have the columns `input_ids`, `token_type_ids` (null where the base does not want them), `labels`
    (names: one, several, or one per token with null where there is none), `length` (in tokens), `hash`, `origin` and
    `row` (JSON, see `LabelledRow.from_json`).

    Attributes:
        labels: The labels, in the order of the head's outputs.
    """

    train: "Dataset"
    validation: "Dataset"
    labels: tuple[str, ...]
    report: ClassificationReport

    @property
    def notes(self) -> list[str]:
        """Return what a user should know of the reading."""
        report = self.report
        notes = [f"Dropped: {report.dropped}."] if report.dropped else []
        if report.truncated:
            notes.append(f"Rows longer than {report.max_length} tokens, cut: {report.truncated:,}.")
        if report.leaks.exact or report.leaks.near:
            found = f"{report.leaks.exact:,} rows that training has too, and {report.leaks.near:,} nearly the same"
            notes.append(f"Validation holds {found}.")
        return [*notes, *report.notes]

    @property
    def refused(self) -> bool:
        """Say whether nothing can be trained on these rows."""
        return self.report.refused

    @property
    def problem(self) -> str:
        """Return `single_label`, `multi_label` or `token`."""
        return self.report.problem

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return self.report.reference()

    def table(self) -> "RenderableType":
        """Return the whole report, for a terminal."""
        return report_table(self.report)


def load_rows(
    section: ClassificationData, encoder: TextEncoder, *, embeddings: int | None, tolerant: bool = False
) -> ClassificationSplit:
    """Return the encoded splits of a data section, from the cache when nothing has changed.

    Args:
        section: The data and how to read it.
        encoder: Of the base, with the longest row.
        embeddings: Tokens that the base has embeddings for; None lets every token pass.
        tolerant: Go on after broken rows and list them in `report.problems`.

    Raises:
        DataError: The data cannot be found, read or trained on; the message names file, row and field.
        StorageError: The cache cannot be written.
    """
    sources = training_sources(section)
    of_rows = section.model_dump(mode="json", exclude={"licence", "attribution", "max_length"})
    content = [[source.content_hash, source.remarks] for source in sources]
    base = [tokenizer_hash(encoder.tokenizer), embeddings, encoder.max_length]
    key = hash_data(["classification", _VERSION, content, of_rows, *base, tolerant])
    folder = settings().cache / "data" / short(key)
    found = open_kept(folder, ClassificationReport)
    if found is None:
        with staged_folder(folder) as stage:
            _Building(section, sources, encoder, embeddings, tolerant).build(stage)
        found = open_kept(folder, ClassificationReport)
    assert found is not None
    kept, report = found
    report = report.with_fields(licence=section.licence, attribution=section.attribution)
    return ClassificationSplit(*kept, tuple(report.labels["train"]), report)


@dataclass
class _Building:
    """One reading of a data section into a folder."""

    section: ClassificationData
    sources: list[Source]
    encoder: TextEncoder
    embeddings: int | None
    tolerant: bool
    readings: list[Reading] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    by_text: "array[float]" = field(default_factory=lambda: array("d"))
    labels: list[tuple[str, ...]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    wordless: int = 0

    def build(self, stage: Path) -> None:
        """Write rows, the mask of held-out rows, and the report into `stage`."""
        import numpy as np

        self._write(stage)
        problems: list[str] = []
        notes: list[str] = []
        names: tuple[str, ...] = ()
        held = np.zeros(len(self.lengths), dtype=bool)
        problem = self._problem()
        try:
            self._require_rows()
            held, notes = self._held(problem)
            names, more = self._names(held, problem)
            notes += more
        except DataError as error:
            if not self.tolerant:
                raise
            problems.append(str(error))
        leaks = _leaks(stage, held)
        tallies = [reading.tally for reading in self.readings]
        found = [line for tally, source in zip(tallies, self.sources, strict=True) for line in tally.notes(source)]
        found += [line for reading in self.readings for line in reading.notes()]
        if self.wordless:
            found.append(f"Words without a token of this base, which have no label then: {self.wordless:,}.")
        report = ClassificationReport(
            source=self.section.path,
            format="+".join(sorted(set().union(*(tally.formats for tally in tallies)))),
            problem=problem,
            hash=self._hash(held),
            max_length=self.encoder.max_length,
            leaks=leaks,
            refused=bool(problems),
            problems=(*(line for tally in tallies for line in tally.problems), *problems),
            notes=(*found, *notes),
            **self._figures(held, names),
        )
        keep_report(stage, held, report)

    def _write(self, folder: Path) -> None:
        import pyarrow as pa

        schema = pa.schema(
            [("input_ids", pa.list_(pa.int32())), ("token_type_ids", pa.list_(pa.int8())),
             ("labels", pa.list_(pa.string())), ("length", pa.int32()), ("hash", pa.string()), ("origin", pa.string()),
             ("row", pa.string())]
        )  # fmt: skip
        write_arrow(folder, self._encoded(), schema)

    def _encoded(self) -> Iterator[dict[str, Any]]:
        for source, limit in zip(self.sources, [self.section.max_rows, None], strict=False):
            reading = Reading()
            self.readings.append(reading)
            self.written.append(0)
            for row in stream_rows(self.section, source, reading, tolerant=self.tolerant, limit=limit):
                try:
                    encoded = self._fitting(row, reading.tally.counts)
                except DataError as error:
                    if not self.tolerant:
                        raise
                    reading.tally.counts["broken"] += 1
                    reading.tally.add_problem(str(error))
                    continue
                if encoded is not None:
                    self.written[-1] += 1
                    yield self._kept(row, encoded)

    def _fitting(self, row: LabelledRow, counts: Counter[str]) -> Encoded | None:
        """Encode a row; None for one that is dropped."""
        encoded = self.encoder.encode(row.text, row.pair, row.words)
        if (lacking := no_embedding(self.encoder.tokenizer, encoded.input_ids, self.embeddings)) is not None:
            raise DataError(f"{row.origin}: {lacking}.")
        if not encoded.input_ids or (row.words is not None and not any(p is not None for p in encoded.first_of)):
            counts["empty"] += 1
            return None
        if not encoded.truncated:
            return encoded
        if self.section.too_long == "error":
            raise DataError(
                f"{row.origin}: the row has more than {self.encoder.max_length} tokens; shorten it, or let such rows "
                "be cut with --set data.too_long=truncate."
            )
        counts["too_long" if self.section.too_long == "drop" else "truncated"] += 1
        return None if self.section.too_long == "drop" else encoded

    def _kept(self, row: LabelledRow, encoded: Encoded) -> dict[str, Any]:
        labels: list[str | None] = list(row.labels)
        if row.words is not None:
            labels = [None] * len(encoded.input_ids)
            for place, label in zip(encoded.first_of, row.labels, strict=True):
                if place is not None:
                    labels[place] = label
            if not encoded.truncated:
                self.wordless += encoded.first_of.count(None)
        self.labels.append(tuple(label for label in labels if label is not None))
        self.lengths.append(len(encoded.input_ids))
        self.by_text.append(points(row.as_text())[1])
        self.hashes.append(row.hash)
        return {
            "input_ids": encoded.input_ids,
            "token_type_ids": encoded.token_type_ids,
            "labels": labels,
            "length": len(encoded.input_ids),
            "hash": row.hash,
            "origin": row.origin,
            "row": row.to_json(),
        }

    def _problem(self) -> str:
        if self.section.problem != "auto":
            return self.section.problem
        met = {kind for reading in self.readings for kind in reading.problems}
        return next((kind for kind in ("token", "multi_label") if kind in met), "single_label")

    def _require_rows(self) -> None:
        for source, reading, count in zip(self.sources, self.readings, self.written, strict=True):
            if not count:
                raise DataError(explain_nothing(source.name, reading.tally.counts))
        if self.written[0] == 1:
            raise DataError(
                f"{self.sources[0].name!r} has one row to use; training needs at least two, one to learn from and one "
                "to check with."
            )

    def _held(self, problem: str) -> tuple[Any, list[str]]:
        import numpy as np

        if len(self.sources) > 1:
            held = np.zeros(len(self.lengths), dtype=bool)
            held[self.written[0] :] = True
            return held, []
        labels: Sequence[Sequence[str]] = [()] * len(self.labels) if problem == "token" else self.labels
        return choose_stratified(np.array(self.by_text), labels, self.section.validation_share)

    def _names(self, held: Any, problem: str) -> tuple[tuple[str, ...], list[str]]:
        counts = self._counts(held)
        given = self.section.labels if self.section.labels != "auto" else self.readings[0].names
        if self.section.labels == "auto" and not {*counts["train"]} <= {*(given or ())}:
            given = None  # what stands in the rows is not what the dataset calls its labels
        names = given or order_labels(counts["train"])
        return names, check_labels(names, counts["train"], counts["validation"], int((~held).sum()), problem)

    def _counts(self, held: Any) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {"train": Counter(), "validation": Counter()}
        for labels, is_held in zip(self.labels, held, strict=True):
            found["validation" if is_held else "train"].update(labels)
        return found

    def _figures(self, held: Any, names: Sequence[str]) -> dict[str, Any]:
        import numpy as np

        length = np.array(self.lengths, dtype=np.int64)
        masks = {"train": ~held, "validation": held}
        counts = self._counts(held)
        names = names or sorted({*counts["train"], *counts["validation"]})
        return {name: sum(reading.tally.counts[name] for reading in self.readings) for name in _COUNTED} | {
            "rows": {split: int(mask.sum()) for split, mask in masks.items()},
            "tokens": {split: int(length[mask].sum()) for split, mask in masks.items()},
            "labels": {split: {name: counts[split][name] for name in names} for split in masks},
            "longest": int(length.max()) if len(length) else 0,
            "mean_length": float(length.mean()) if len(length) else 0.0,
        }

    def _hash(self, held: Any) -> str:
        marked = (f"{h} {'validation' if is_held else 'train'}" for h, is_held in zip(self.hashes, held, strict=True))
        return hash_data([hash_parts(marked), self.encoder.max_length])


def _leaks(stage: Path, held: Any) -> Leaks:
    import numpy as np

    rows = arrow_rows(stage)

    def texts(chosen: Any, what: str | None = None) -> Iterator[Conversation]:
        part = rows.select(chosen).select_columns(["row", "origin"])
        found = (LabelledRow.from_json(row["row"], row["origin"]).as_text() for row in part)
        return tracked(found, what, total=len(part)) if what else found

    return find_leaks(texts(np.flatnonzero(held)), texts(np.flatnonzero(~held), "Looking for leaks"))
