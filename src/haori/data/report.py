"""What is known about a dataset once it was read: every row is accounted for.

For each source: `read == kept + empty + duplicates + broken`, and after tokenising
`kept == rows in splits + too_long + untrained` (with `truncated` rows among those kept).
"""

from typing import Any, ClassVar

from pydantic import Field

from haori.core.records import DataReference, Record

__all__ = ["Bucket", "DataReport", "Leaks", "ReadReport", "histogram_of"]

_DROPPED = {
    "empty": "empty",
    "duplicates": "exact duplicates",
    "broken": "broken",
    "too_long": "too long",
    "untrained": "no answer with loss",
}


def _dropped(report: "ReadReport | DataReport") -> str | None:
    """Say how many rows were dropped and why, with their share; None where none was."""
    reasons_of = _DROPPED | report.also_dropped
    counts = {what: getattr(report, name, 0) for name, what in reasons_of.items()}
    total = sum(counts.values())
    if not total:
        return None
    reasons = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    share = 100 * total / report.read
    return f"{reasons} ({'under 1' if share < 1 else f'{share:.0f}'}% of the rows read)"


class ReadReport(Record):
    """What reading and cleaning found, before any tokenizer."""

    also_dropped: ClassVar[dict[str, str]] = {}

    source: str
    format: str = Field(description="Row format; several joined by + when files differ.")
    hash: str = Field(description="Hash of the kept rows' contents, in order.")
    read: int = Field(description="Rows read.")
    kept: int = Field(description="Rows left after cleaning.")
    empty: int = Field(default=0, description="Rows dropped: nothing asked, or nothing answered.")
    duplicates: int = Field(default=0, description="Rows dropped: the same content came before.")
    broken: int = Field(default=0, description="Rows that could not be read (only a check goes on after one).")
    control_characters: int = Field(default=0, description="Rows from which control characters were removed.")
    problems: tuple[str, ...] = Field(default=(), description="Each with file:row:field and the row, shortened.")
    notes: tuple[str, ...] = Field(default=(), description="What else a person should know.")
    licence: str | None = None
    attribution: str | None = None

    @property
    def dropped(self) -> str | None:
        """Say how many rows were dropped and why, with their share; None where none was."""
        return _dropped(self)

    def reference(self) -> DataReference:
        """Return the short form that cards and evaluations keep."""
        return DataReference(
            source=self.source,
            hash=self.hash,
            format=self.format,
            rows={"all": self.kept},
            licence=self.licence,
            attribution=self.attribution,
        )


class Bucket(Record):
    """One bar of the length histogram: rows of `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


def histogram_of(length: Any) -> tuple[Bucket, ...]:
    """Count rows by length, in buckets whose upper ends are powers of two, from the shortest to the longest."""
    import numpy as np

    if not len(length):
        return ()
    exponents = np.maximum(np.ceil(np.log2(length)), 3).astype(int)
    counts = np.bincount(exponents)
    return tuple(
        Bucket(low=1 if e == 3 else 2 ** (e - 1) + 1, high=2**e, rows=int(counts[e]))
        for e in range(int(exponents.min()), len(counts))
    )


class Leaks(Record):
    """Rows of the validation split that training has seen."""

    exact: int = Field(default=0, description="Validation rows whose text, but for case and spacing, is in training.")
    near: int = Field(
        default=0, description="Validation rows with a near-duplicate in training (exact ones not counted)."
    )
    compared: int = Field(default=0, description="Validation rows compared for near-duplicates.")
    threshold: float = Field(description="Jaccard similarity of word 3-grams from which rows are near-duplicates.")
    examples: tuple[str, ...] = Field(default=(), description="Pairs with both origins.")


class DataReport(Record):
    """A dataset, ready for training, in figures. Lengths are in tokens; splits are `train` and `validation`."""

    also_dropped: ClassVar[dict[str, str]] = {}
    """Further reasons for which a task's rows are dropped: the field that counts them, and words."""

    source: str
    format: str
    hash: str = Field(description="Hash of rows in order, their splits, template, max_length and train_on.")
    template_hash: str
    train_on: str
    max_length: int
    read: int
    empty: int = 0
    duplicates: int = 0
    broken: int = 0
    control_characters: int = 0
    too_long: int = Field(
        default=0, description="Rows dropped: longer than max_length, or no answer left after the cut."
    )
    truncated: int = Field(default=0, description="Rows cut to max_length and kept.")
    untrained: int = Field(default=0, description='Rows dropped: every answer says "loss": false.')
    rows: dict[str, int] = Field(description="Rows per split.")
    tokens: dict[str, int] = Field(description="Tokens per split.")
    trained_tokens: dict[str, int] = Field(description="Tokens with loss per split.")
    longest: int = 0
    mean_length: float = 0.0
    median_length: float = 0.0
    histogram: tuple[Bucket, ...] = ()
    leaks: Leaks
    refused: bool = Field(
        default=False, description="Training would refuse the dataset as a whole; a problem says why."
    )
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None

    @property
    def dropped(self) -> str | None:
        """Say how many rows were dropped and why, with their share; None where none was."""
        return _dropped(self)

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return DataReference(
            source=self.source,
            hash=self.hash,
            format=self.format,
            rows=self.rows,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            licence=self.licence,
            attribution=self.attribution,
        )
