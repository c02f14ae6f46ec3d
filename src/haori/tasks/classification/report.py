"""What is known of labelled data once it was read: every row is accounted for, and every label counted."""

from typing import TYPE_CHECKING

from pydantic import Field

from haori.core.hashing import short
from haori.core.records import DataReference, Record
from haori.data.report import Leaks

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ClassificationReport", "report_table"]

_DROPPED = {
    "empty": "without text or label",
    "duplicates": "exact duplicates",
    "broken": "broken",
    "too_long": "too long",
}
_BAR = 30
_LABELS_SHOWN = 40


class ClassificationReport(Record):
    """A labelled dataset, ready for training, in figures; splits are `train` and `validation`, lengths in tokens."""

    source: str
    format: str
    problem: str = Field(description="single_label, multi_label or token.")
    hash: str = Field(description="Hash of rows in order, their splits, and how they were encoded.")
    max_length: int
    read: int
    empty: int = 0
    duplicates: int = 0
    broken: int = 0
    control_characters: int = 0
    too_long: int = Field(default=0, description="Rows dropped: longer than max_length.")
    truncated: int = Field(default=0, description="Rows cut to max_length and kept.")
    rows: dict[str, int] = Field(description="Rows per split.")
    tokens: dict[str, int] = Field(description="Tokens per split.")
    labels: dict[str, dict[str, int]] = Field(description="Rows, or words, of each label per split.")
    longest: int = 0
    mean_length: float = 0.0
    leaks: Leaks
    refused: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    licence: str | None = None
    attribution: str | None = None

    @property
    def dropped(self) -> str | None:
        """Say how many rows were dropped and why, with their share; None where none was."""
        counts = {what: getattr(self, name) for name, what in _DROPPED.items()}
        total = sum(counts.values())
        if not total:
            return None
        reasons = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        share = 100 * total / self.read
        return f"{reasons} ({'under 1' if share < 1 else f'{share:.0f}'}% of the rows read)"

    def reference(self) -> DataReference:
        """Return the short form that cards and runs keep."""
        return DataReference(
            source=self.source, hash=self.hash, format=self.format, rows=self.rows, tokens=self.tokens,
            licence=self.licence, attribution=self.attribution,
        )  # fmt: skip


def report_table(report: ClassificationReport) -> "RenderableType":
    """Return the report: rows per split, what was dropped, labels, lengths, leaks and problems."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    changed = [f"{report.control_characters:,} freed of control characters"] if report.control_characters else []
    changed += [f"{report.truncated:,} truncated"] if report.truncated else []
    leaks = report.leaks
    for name, value in {
        "Source": report.source,
        "Format": f"{report.format} ({report.problem.replace('_', ' ')})",
        "Hash": short(report.hash),
        "Rows read": f"{report.read:,}",
        "Dropped": report.dropped or "none",
        "Changed": ", ".join(changed) or "none",
        "Length": f"mean {report.mean_length:.0f}, longest {report.longest:,} tokens (limit {report.max_length:,})",
        "Leaks": f"{leaks.exact:,} exact, {leaks.near:,} near (similarity from {leaks.threshold:g}, "
        f"{leaks.compared:,} rows compared)",
        "Licence": report.licence or "not given",
    }.items():
        facts.add_row(Text(name, style="bold"), Text(value))
    splits = Table("Split", title_justify="left")
    for column in ("Rows", "Tokens"):
        splits.add_column(column, justify="right")
    for split, rows in report.rows.items():
        splits.add_row(split, f"{rows:,}", f"{report.tokens[split]:,}")
    parts: list[RenderableType] = [facts, splits, _labels(report)]
    parts += [Text(f"Note: {note}") for note in report.notes]
    parts += [Text(f"Leak: {example}", style="yellow") for example in leaks.examples if example not in report.problems]
    parts += [Text(f"Problem: {problem}", style="red") for problem in report.problems]
    if not report.problems:
        parts.append(Text("No problems found.", style="green"))
    return Group(*parts)


def _labels(report: ClassificationReport) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table("Label", title_justify="left")
    for split in report.labels:
        table.add_column(split, justify="right")
    table.add_column("")
    names = list(dict.fromkeys(name for counts in report.labels.values() for name in counts))
    most = max((max(counts.values(), default=0) for counts in report.labels.values()), default=0) or 1
    for name in names[:_LABELS_SHOWN]:
        counts = [counts.get(name, 0) for counts in report.labels.values()]
        bar = "#" * max(bool(counts[0]), round(_BAR * counts[0] / most))
        table.add_row(Text(name), *(f"{count:,}" for count in counts), Text(bar, style="cyan"))
    if len(names) > _LABELS_SHOWN:
        table.add_row(Text(f"and {len(names) - _LABELS_SHOWN} more"), *("" for _ in report.labels), "")
    return table
