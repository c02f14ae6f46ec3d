"""Write an evaluation as `evaluation.json` (everything) and `evaluation.html` (one readable page).

All text from data and cards is escaped by the template engine; the page loads nothing and runs no script.
"""

import json
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from haori.core.hashing import short
from haori.core.records import Metric
from haori.core.storage import make_folder, write_text
from haori.evaluation.pictures.embedding import embedded
from haori.evaluation.pictures.result import MeasuredPictures
from haori.evaluation.plots import Dot, DotRow, difference_histogram, dot_plot
from haori.evaluation.result import EvaluationResult, headline, metric_lines
from haori.metrics.kinds import KINDS, Kind

__all__ = ["render_html", "report_style", "write_report"]


def write_report(result: EvaluationResult, folder: Path) -> tuple[Path, Path]:
    """Write both files into `folder` (made if absent) and return their paths, JSON first.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder)
    table, page = folder / "evaluation.json", folder / "evaluation.html"
    html = render_html(result, folder)
    write_text(table, json.dumps(result.to_dict(), ensure_ascii=False, indent=1) + "\n")
    write_text(page, html)
    return table, page


def render_html(result: EvaluationResult, folder: Path | None = None) -> str:
    """Return the report as one HTML page; pictures come from `folder`, and are part of the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files("haori.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return page.render(
        style=report_style(),
        result=result,
        headline=headline(result),
        lines=metric_lines(result),
        value_plots=_value_plots(result),
        difference_plots=_difference_plots(result),
        histogram=_histogram(result),
        matrices=_matrices(result),
        short=short,
        images={} if result.pictures is None or folder is None else _images(result.pictures, folder),
    )


def report_style() -> str:
    """Return the style sheet of reports; it is part of the package."""
    return files("haori.evaluation").joinpath("report.css").read_text(encoding="utf-8")


def _images(pictures: MeasuredPictures, folder: Path) -> dict[str, str]:
    """Return the pictures that the page shows, as addresses that hold them."""
    shown = [pictures.pairs[place] for place in pictures.shown]
    names = [name for pair in shown for name in (pair.base, pair.adapter)]
    names += [name for copy in pictures.copies for name in (copy.drawn, copy.training)]
    return {name: embedded(folder / name) for name in names}


def _value_plots(result: EvaluationResult) -> list[Markup]:
    plots = []
    for scales, label, limits in (
        (("share", "score"), "Metrics from 0 to 100, base and adapter", (-2.0, 102.0)),
        (("coefficient",), "Coefficients from -1 to 1, base and adapter", (-1.02, 1.02)),
        (("nats",), "Figures in nats, base and adapter", None),
        (("distance",), "Distances, base and adapter", None),
        (("perplexity",), "Perplexity, base and adapter", None),
    ):
        rows = [
            DotRow(KINDS[name].title, _dots(result, name, metric))
            for name, metric in _of_scales(result, scales)
        ]  # fmt: skip
        if rows:
            plots.append(dot_plot(rows, label, limits=limits))
    for name, metric in _of_scales(result, ("number",)):
        row = DotRow(KINDS[name].title, _dots(result, name, metric))
        plots.append(dot_plot([row], f"{KINDS[name].title}, base and adapter"))
    return plots


def _difference_plots(result: EvaluationResult) -> list[Markup]:
    plots = []
    for scales, label in (
        (("share", "score"), "Differences in points"),
        (("coefficient",), "Differences of coefficients"),
        (("nats",), "Differences in nats"),
        (("distance",), "Differences of distances"),
        (("perplexity",), "Difference in perplexity"),
    ):
        rows = []
        for name, metric in _of_scales(result, scales):
            if metric.difference is not None:
                kind = KINDS[name]
                ends = (_scaled(kind, metric.difference_low), _scaled(kind, metric.difference_high))
                dot = Dot("adapter", _scaled(kind, metric.difference) or 0.0, *ends, "adapter minus base")
                rows.append(DotRow(kind.title, (dot,)))
        if rows:
            plots.append(dot_plot(rows, f"{label}, adapter minus base", zero=True))
    return plots


def _of_scales(result: EvaluationResult, scales: tuple[str, ...]) -> list[tuple[str, Metric]]:
    return [(name, result.metrics[name]) for name in KINDS if name in result.metrics and KINDS[name].scale in scales]


def _dots(result: EvaluationResult, name: str, metric: Metric) -> tuple[Dot, ...]:
    kind = KINDS[name]
    dots = []
    if metric.base is not None:
        low, high = result.base_intervals.get(name, (None, None))
        dots.append(Dot("base", _scaled(kind, metric.base) or 0.0, _scaled(kind, low), _scaled(kind, high), "base"))
    ends = (_scaled(kind, metric.low), _scaled(kind, metric.high))
    dots.append(Dot("adapter", _scaled(kind, metric.value) or 0.0, *ends, "adapter"))
    return tuple(dots)


def _scaled(kind: Kind, value: float | None) -> float | None:
    return None if value is None else 100 * value if kind.scale == "share" else value


def _histogram(result: EvaluationResult) -> Markup | None:
    """Return the histogram of per-token NLL differences, if both systems were measured."""
    differences = [
        (row.adapter.nll - row.base.nll) / row.tokens
        for row in result.rows
        if row.base is not None and row.adapter.nll is not None and row.base.nll is not None
    ]
    if len(differences) < 2:
        return None
    return difference_histogram(differences, "Negative log-likelihood per token and row, adapter minus base")


def _matrices(result: EvaluationResult) -> list[tuple[str, list[list[tuple[int, float]]]]]:
    """Return (title, cells) with each cell's count and its share of the row, base first."""
    found = result.confusion
    if found is None:
        return []
    sides = [("Adapter", found.adapter)] if found.base is None else [("Base", found.base), ("Adapter", found.adapter)]
    return [
        (title, [[(count, count / max(1, sum(row))) for count in row] for row in counts])
        for title, counts in sides
    ]  # fmt: skip
