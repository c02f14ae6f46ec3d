"""The report on pictures as a rich renderable, for terminals. Prints nothing itself."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from haori.core.hashing import short
from haori.data.pictures.report import PictureReport

__all__ = ["report_table"]

_BAR = 30


def report_table(report: PictureReport) -> RenderableType:
    """Return the report: pictures per split, what was left out or changed, buckets, captions and problems."""
    parts: list[RenderableType] = [_facts(report), _buckets(report)]
    parts += [Text(f"Note: {note}") for note in report.notes]
    parts += [Text(f"Cut: {cut}", style="yellow") for cut in report.cut]
    parts += [Text(f"Problem: {problem}", style="red") for problem in report.problems]
    if not report.problems:
        parts.append(Text("No problems found.", style="green"))
    return Group(*parts)


def _facts(report: PictureReport) -> Table:
    table = Table.grid(padding=(0, 2))
    facts = {
        "Source": report.source,
        "Layout": report.layout,
        "Hash": short(report.hash),
        "Pictures": f"{report.read:,} read; {_counted(report.rows)}",
        "An epoch": f"{report.steps:,} pictures, repeats counted",
        "Left out": _counted(report.dropped) or "none",
        "Changed": _counted(report.changed) or "none",
        "Captions": _counted(report.captions) or "each picture has its own",
        "Licence": report.licence or "not given",
    }
    if report.attribution:
        facts["Attribution"] = report.attribution
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def _buckets(report: PictureReport) -> Table:
    table = Table("Bucket")
    table.add_column("Pictures", justify="right")
    table.add_column("")
    most = max((bucket.pictures for bucket in report.buckets), default=1)
    for bucket in report.buckets:
        bar = "#" * max(1, round(_BAR * bucket.pictures / most))
        table.add_row(f"{bucket.width} x {bucket.height}", f"{bucket.pictures:,}", Text(bar, style="cyan"))
    return table
