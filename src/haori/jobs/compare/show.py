"""A comparison on the terminal: scores, what they took, and what failed, as rich tables."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haori.jobs.compare.lines import TITLES, cost_lines, headline, metrics_of, score_lines
from haori.jobs.compare.records import Comparison
from haori.metrics.kinds import KINDS
from haori.tasks.registry import task_of

__all__ = ["show_comparison"]


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the finding, the tables, and the sentence of each method that failed."""
    console.print(Text(headline(comparison), style="bold"))
    for metric in metrics_of(comparison):
        console.print(_scores(comparison, metric))
    if cost_lines(comparison):
        console.print(_costs(comparison))
    for result in comparison.methods:
        for error in result.errors:
            console.print(Text(f"{TITLES[result.method]} failed: {error}", style="red"))


def _scores(comparison: Comparison, metric: str) -> Table:
    kind = KINDS[metric]
    full = any(result.method == "full" for result in comparison.methods)
    table = Table(box=SIMPLE_HEAD, title=f"{kind.title}, {kind.better} is better", title_justify="left")
    table.add_column("Method")
    for title in ("mean [95%]", "seeds", "minus base [95%]", *(["minus full [95%]"] if full else [])):
        table.add_column(title, justify="right")
    for line in score_lines(comparison, metric):
        cells = [
            Text(line.method),
            _with(line.value, line.interval),
            Text(line.spread.removesuffix(" points")),
            _with(line.against_base.removesuffix(" points"), line.against_base_interval),
        ]
        if full:
            cells.append(_with(line.against_full.removesuffix(" points"), line.against_full_interval))
        table.add_row(*cells)
    return table


def _costs(comparison: Comparison) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("Method")
    task = task_of(comparison.recipe.task)
    for title in ("lr", "training", f"{task.unit}/s", "peak", "trained", "file", f"{task.general.column} [95%]"):
        table.add_column(title, justify="right")
    for line in cost_lines(comparison):
        plain = (line.lr, line.time, line.speed, line.peak, line.trained, line.size)
        table.add_row(Text(line.method), *map(Text, plain), _with(line.forgot, line.forgot_interval))
    return table


def _with(value: str, interval: str) -> Text:
    return Text(f"{value} [{interval}]" if interval else value)
