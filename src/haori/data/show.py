"""Reports and samples as rich renderables, for terminals. Prints nothing itself."""

from collections.abc import Iterable, Mapping
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from haori.core.hashing import short
from haori.data.rendered_row import IGNORED
from haori.data.report import DataReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["report_table", "sample_panels"]

_BAR = 30
_CHANGED = {"control_characters": "freed of control characters", "truncated": "truncated"}


def report_table(report: DataReport) -> RenderableType:
    """Return the report: rows per split, what was dropped, lengths with a histogram, leaks and problems."""
    parts: list[RenderableType] = [_facts(report), _splits(report)]
    if report.histogram:
        parts.append(_histogram(report))
    for note in report.notes:
        parts.append(Text(f"Note: {note}"))
    for example in report.leaks.examples:
        if example not in report.problems:
            parts.append(Text(f"Leak: {example}", style="yellow"))
    parts += [Text(f"Problem: {problem}", style="red") for problem in report.problems]
    if not report.problems:
        parts.append(Text("No problems found.", style="green"))
    return Group(*parts)


def sample_panels(
    tokenizer: "PreTrainedTokenizerBase", rows: Iterable[Mapping[str, Any]], n: int = 3
) -> list[RenderableType]:
    """Return the first `n` rows as the model sees them; trained tokens stand in [[ ]], bold and underlined.

    Args:
        tokenizer: The base's.
        rows: Rows with `input_ids`, `labels` and `origin`, such as `TextData.train`.
        n: How many.
    """
    return [_panel(tokenizer, row) for row in islice(rows, n)]


def _panel(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> Panel:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    text = Text()
    for trained, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode(
            [token for token, _ in run], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        text.append(f"[[{piece}]]" if trained else piece, style="bold underline green" if trained else "dim")
    count = sum(label != IGNORED for label in labels)
    title = Text(f"{row['origin']}: {len(ids)} tokens, {count} trained")
    return Panel(text, title=title, subtitle=Text("[[ ]] = trained"), title_align="left", subtitle_align="left")


def _facts(report: DataReport) -> Table:
    table = Table.grid(padding=(0, 2))
    changed = [f"{getattr(report, name):,} {what}" for name, what in _CHANGED.items() if getattr(report, name)]
    leaks = report.leaks
    facts = {
        "Source": report.source,
        "Format": report.format,
        "Hash": short(report.hash),
        "Rows read": f"{report.read:,}",
        "Dropped": report.dropped or "none",
        "Changed": ", ".join(changed) or "none",
        "Length": f"mean {report.mean_length:.0f}, median {report.median_length:.0f}, longest {report.longest:,} "
        f"tokens (limit {report.max_length:,})",
        "Leaks": f"{leaks.exact:,} exact, {leaks.near:,} near (similarity from {leaks.threshold:g}, "
        f"{leaks.compared:,} rows compared)",
        "Licence": report.licence or "not given",
    }
    if report.attribution:
        facts["Attribution"] = report.attribution
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _splits(report: DataReport) -> Table:
    table = Table("Split", title_justify="left")
    for column in ("Rows", "Tokens", "Trained tokens"):
        table.add_column(column, justify="right")
    for split, rows in report.rows.items():
        table.add_row(split, f"{rows:,}", f"{report.tokens[split]:,}", f"{report.trained_tokens[split]:,}")
    return table


def _histogram(report: DataReport) -> Table:
    table = Table.grid(padding=(0, 2))
    most = max(bucket.rows for bucket in report.histogram)
    for bucket in report.histogram:
        bar = "#" * max(bool(bucket.rows), round(_BAR * bucket.rows / most))
        table.add_row(Text(f"{bucket.low:,}-{bucket.high:,} tokens"), Text(bar, style="cyan"), Text(f"{bucket.rows:,}"))
    return table
