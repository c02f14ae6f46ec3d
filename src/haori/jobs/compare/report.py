"""A comparison as one readable page: the tables of the terminal, and three figures.

All text is escaped by the template engine; the page loads nothing and runs no script.
"""

from importlib.resources import files

from markupsafe import Markup

from haori.core.hashing import short
from haori.jobs.compare.lines import TITLES, cost_lines, forgetting_cell, headline, metrics_of, score_lines
from haori.jobs.compare.plots import Bar, Curve, Place, bars, curves, scatter
from haori.jobs.compare.recipes import BASE
from haori.jobs.compare.records import Comparison, MethodResult
from haori.metrics.kinds import KINDS, Kind
from haori.tasks.registry import task_of

__all__ = ["render_comparison"]

_SETS = ("shipped", "own")


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as one HTML page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("haori.jobs.compare").joinpath("compare.html.j2").read_text(encoding="utf-8")
    metrics = metrics_of(comparison)
    return environment.from_string(source).render(
        comparison=comparison,
        headline=headline(comparison),
        methods=_kinds(comparison),
        tables=[(KINDS[metric], score_lines(comparison, metric)) for metric in metrics],
        has_full=any(result.method == "full" for result in comparison.methods),
        costs=cost_lines(comparison),
        figures=[*_scatter(comparison, metrics[0]), *_curves(comparison), *_forgetting(comparison)],
        kinds_of_text=_kinds_of_text(comparison),
        failures=[(TITLES[result.method], error) for result in comparison.methods for error in result.errors],
        sweeps=[result for result in comparison.methods if result.rates],
        titles=TITLES,
        task=task_of(comparison.recipe.task),
        short=short,
    )


def _kinds(comparison: Comparison) -> dict[str, str]:
    """Return the CSS class of each method, in the order of the comparison."""
    trained = [result.method for result in comparison.methods if result.method != BASE]
    return {method: f"m{place}" for place, method in enumerate(trained)}


def _trained(comparison: Comparison) -> list[MethodResult]:
    return [result for result in comparison.methods if result.cost is not None]


def _scatter(comparison: Comparison, metric: str) -> list[tuple[str, Markup]]:
    kind, kinds = KINDS[metric], _kinds(comparison)
    places = []
    for result in _trained(comparison):
        score, cost = result.scores[metric], result.cost
        assert cost is not None
        low, high = (None if end is None else _shown(kind, end) for end in (score.low, score.high))
        gigabytes = cost.peak_memory_bytes / 1e9
        name = TITLES[result.method]
        places.append(Place(kinds[result.method], name, gigabytes, _shown(kind, score.value), low, high))
    if not places:
        return []
    bare = comparison.methods[0].scores[metric].value
    unit = f"{kind.title}, %" if kind.scale == "share" else kind.title
    drawn = scatter(
        places,
        f"{kind.title} against peak memory of training",
        x_title="peak memory of training, GB",
        y_title=unit,
        level=("base", _shown(kind, bare)),
    )
    return [(f"{kind.title} ({kind.better} is better) against peak memory", drawn)]


def _curves(comparison: Comparison) -> list[tuple[str, Markup]]:
    kinds = _kinds(comparison)
    series = [
        Curve(
            kinds[result.method],
            f"{TITLES[result.method]}, seed {seed}",
            tuple((point.epoch, point.loss) for point in curve),
        )
        for result in _trained(comparison)
        for seed, curve in zip(result.seeds, result.curves, strict=True)
        if curve
    ]
    if not series:
        return []
    label = "Validation loss over epochs"
    return [
        (label, curves(series, label, x_title="epoch", y_title=task_of(comparison.recipe.task).loss_unit or "loss"))
    ]


def _forgetting(comparison: Comparison) -> list[tuple[str, Markup]]:
    kinds = _kinds(comparison)
    figures = []
    words = task_of(comparison.recipe.task).general
    for name, title in zip(_SETS, words.sets, strict=True):
        rows = []
        for result in _trained(comparison):
            if name in result.forgetting:
                whole = result.forgetting[name].whole
                text = " ".join(part for part in forgetting_cell(result, name) if part)
                bar = Bar(kinds[result.method], TITLES[result.method], whole.difference, whole.low, whole.high, text)
                rows.append(bar)
        if rows:
            label = words.figure.format(title)
            figures.append((label, bars(rows, label, x_title=words.axis)))
    return figures


def _kinds_of_text(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """Return for each kind of general text: its name, the base's loss, and each method's change."""
    trained = [result for result in _trained(comparison) if "shipped" in result.forgetting]
    if not trained:
        return []
    first = trained[0].forgetting["shipped"]
    parts = [("all", [result.forgetting["shipped"].whole for result in trained])]
    parts += [(kind, [result.forgetting["shipped"].kinds[kind] for result in trained]) for kind in first.kinds]
    return [
        (
            f"{name}, {changes[0].passages} {task_of(comparison.recipe.task).general.passages}",
            f"{changes[0].before:.3f}",
            [f"{c.difference:+.3f}" for c in changes],
        )
        for name, changes in parts
    ]


def _shown(kind: Kind, value: float) -> float:
    return 100 * value if kind.scale == "share" else value
