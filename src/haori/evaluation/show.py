"""An evaluation on the terminal: the metrics table, side-by-side samples and likely copies, as rich renderables.

Text from data is never read as rich markup.
"""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from haori.evaluation.pictures.result import MeasuredPictures
from haori.evaluation.result import EvaluationResult, headline, metric_lines
from haori.tasks.examination import Answer, Sample

__all__ = ["metrics_table", "sample_panels", "show_result"]

_SHORT = {"better": "better", "worse": "worse", "no clear difference": "unclear"}
_STYLES = {"better": "green", "worse": "red"}


def show_result(result: EvaluationResult, console: Console, *, notes: bool = True) -> None:
    """Print the finding, the metrics, the samples and how they were made."""
    console.print(Text(headline(result), style="bold"))
    console.print(metrics_table(result))
    for panel in sample_panels(result):
        console.print(panel)
    if result.pictures is not None and result.pictures.copies:
        console.print(_copies(result.pictures))
    if notes:
        for note in result.notes:
            console.print(Text(f"- {note}", style="dim"))


def metrics_table(result: EvaluationResult) -> Table:
    """Return metrics of base and adapter with the difference and its 95% interval."""
    compared = result.against is not None
    table = Table(box=SIMPLE_HEAD, caption=Text(result.measured_on), caption_justify="left")
    table.add_column("Metric")
    if compared:
        table.add_column("Base", justify="right")
        table.add_column("Adapter", justify="right")
        table.add_column("Difference [95%]", justify="right")
        table.add_column("Adapter is")
    else:
        table.add_column("Adapter [95%]", justify="right")
    for line in metric_lines(result):
        name = Text(line.kind.title)
        if compared:
            verdict = Text(_SHORT.get(line.verdict or "", ""), style=_STYLES.get(line.verdict or "", ""))
            difference = _with_interval(line.difference.removesuffix(" points"), line.difference_interval)
            table.add_row(name, line.base, line.adapter, difference, verdict)
        else:
            table.add_row(name, _with_interval(line.adapter, line.adapter_interval))
    return table


def sample_panels(result: EvaluationResult) -> Iterator[Panel]:
    """Yield one panel per sample: prompt, reference, and both answers."""
    for number, sample in enumerate(result.samples, 1):
        yield Panel(_sample(sample), title=f"sample {number} of {len(result.samples)}", title_align="left")


def _copies(pictures: MeasuredPictures) -> Table:
    """Return the pictures that are taken for copies, the nearest first."""
    title = f"Taken for copies: at most {pictures.limit:.3f} from a training picture"
    table = Table(box=SIMPLE_HEAD, title=Text(title), title_justify="left")
    for column in ("Prompt", "Seed", "Training picture", "Distance", "Base's"):
        table.add_column(column, justify="left" if column in ("Prompt", "Training picture") else "right")
    for copy in pictures.copies:
        figures = (f"{copy.distance:.3f}", f"{copy.base_distance:.3f}")
        table.add_row(Text(copy.prompt), f"{copy.seed}", Text(copy.origin.rpartition("/")[2]), *figures)
    return table


def _sample(sample: Sample) -> Group:
    lines: list[RenderableType] = [
        Text.assemble((f"{turn.role}  ", "dim"), turn.content) for turn in sample.prompt
    ]  # fmt: skip
    lines += [Rule(style="dim"), Text.assemble(("reference  ", "dim"), sample.reference)]
    for title, answer, style in (("base", sample.base, "yellow"), ("adapter", sample.adapter, "cyan")):
        if answer is not None:
            lines.append(_answer(title, answer, style))
    return Group(*lines)


def _answer(title: str, answer: Answer, style: str) -> Text:
    chosen = f" chose {answer.label}:" if answer.label is not None else ""
    return Text.assemble((f"{title}{chosen}  ", style), answer.text or "(nothing)")


def _with_interval(figure: str, interval: str) -> Text:
    return Text(f"{figure} [{interval}]" if interval else figure)
