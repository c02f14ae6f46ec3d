"""What came of a sweep, for people: the table, the plot, the winner as a recipe, and what to do next.

Reads a `SweepResult`; runs nothing.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.storage import explain_os_errors, write_text
from haori.jobs.sweep.search import SweepResult
from haori.jobs.sweep.space import Choices, Numbers, Range
from haori.jobs.sweep.study import SweepTrial, Value
from haori.tasks.recipe import load_recipe, recipe_to_yaml
from haori.tasks.registry import DEFAULT_TASK, task_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["draw_sweep", "next_command", "remarks", "trial_table", "write_winner"]

_CLOSE = 1.01  # a runner-up within 1% may be as good: the losses of two seeds differ by about as much
_EDGE = 0.1  # a best value in the outer tenth of its range
_BEST, _OTHER, _PRUNED = "#c4502e", "#2f5d8a", "#9db4c8"


def trial_table(result: SweepResult) -> "Table":
    """Return the trials as a table, the best first."""
    from rich.markup import escape
    from rich.table import Table

    keys = [one.key for one in result.space]
    table = Table(title=f"{len(result.trials)} of {result.wanted} trials", title_justify="left")
    for heading in ("trial", *keys, "validation loss", "best epoch", "training", "ended"):
        table.add_column(heading, justify="left" if heading == "ended" else "right")
    for trial in result.trials:
        outcome = trial.outcome
        best = trial is result.best
        table.add_row(
            f"{trial.number}",
            *(escape(str(trial.values[key])) for key in keys),
            "" if outcome.loss is None else f"{outcome.loss:.4f}",
            "" if outcome.best_epoch is None else f"{outcome.best_epoch}",
            f"{outcome.seconds:.0f} s" if outcome.seconds else "",
            "best" if best else {"pruned": "given up"}.get(outcome.state, escape(outcome.error or outcome.state)),
            style="bold green" if best else "dim" if outcome.state != "finished" else None,
        )
    return table


def remarks(result: SweepResult) -> list[str]:
    """Say what the result means: how far ahead the best is, and which ranges it wants to leave."""
    best = result.best
    if best is None or best.outcome.loss is None:
        return []
    said = []
    finished = [trial for trial in result.trials if trial.outcome.state == "finished"]
    close = [t for t in finished[1:] if t.outcome.loss is not None and t.outcome.loss < best.outcome.loss * _CLOSE]
    if close:
        said.append(
            f"{len(close)} other trial{'s are' if len(close) > 1 else ' is'} within 1% of the best; another seed could "
            "change their order, so take the cheaper one."
        )
    said += [_at_the_edge(one, best.values[one.key]) for one in result.space if _is_at_edge(one, best.values[one.key])]
    fixed = result.plan.recipe.get("method", {}).get("alpha", "auto")
    if fixed != "auto" and any(one.key == "method.rank" for one in result.space):
        said.append(
            f"method.alpha was {fixed:g} at every rank, so the scale of the update changed with the rank; with "
            "--set method.alpha=auto it stays the same."
        )
    return said


def write_winner(result: SweepResult, path: Path) -> None:
    """Write the recipe of the best trial, every value resolved, with its figures as comments on top."""
    best = result.best
    assert best is not None and best.outcome.run is not None and best.outcome.loss is not None
    recipe = load_recipe(Path(best.outcome.run) / "recipe.yaml")
    values = ", ".join(f"{key}={value}" for key, value in best.values.items())
    unit = f"{task_of(recipe.task).loss_unit} ".lstrip()
    head = [
        f"The best of {len(result.trials)} trials of a sweep over {' '.join(result.plan.over)}",
        f"Validation loss {best.outcome.loss:.4f} {unit}at epoch {best.outcome.best_epoch}",
        f"Trial {best.number}: {values}",
    ]
    write_text(path, "".join(f"# {line}\n" for line in head) + recipe_to_yaml(recipe))


def next_command(recipe: Path) -> str:
    """Return the command that trains a recipe."""
    return f"haori train {shlex.quote(str(recipe))}"


def draw_sweep(result: SweepResult, path: Path) -> None:
    """Draw validation loss against each key as a PNG; the best trial is starred, those given up are hollow.

    Losses far above the rest are drawn as triangles at the upper edge, so that one bad trial does not flatten them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    space = result.space
    columns = min(3, len(space))
    rows = math.ceil(len(space) / columns)
    figure = Figure(figsize=(max(6.0, 4.2 * columns), 4.0 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    drawn = [trial for trial in result.trials if trial.outcome.loss is not None and trial.outcome.state != "failed"]
    top = _top([trial.outcome.loss for trial in drawn if trial.outcome.loss is not None])
    for axes, one in zip(grid, space, strict=False):
        _draw_key(axes, one, drawn, result.best, top)
    for axes in grid[len(space) :]:
        axes.set_axis_off()
    label = task_of(str(result.plan.recipe.get("task", DEFAULT_TASK))).loss_label
    for row in range(rows):
        grid[row * columns].set_ylabel(f"validation {label}")
    handles = {label: mark for axes in grid for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper right", ncols=4, frameon=False)
    with explain_os_errors(path):
        figure.savefig(path)


def _draw_key(axes: "Axes", one: Range, trials: Sequence[SweepTrial], best: SweepTrial | None, top: float) -> None:
    place = _places(axes, one)
    kinds: tuple[tuple[str, str, str, Any], ...] = (
        ("finished", "finished", "o", _OTHER),
        ("pruned", "given up", "o", "none"),
    )
    for state, label, marker, fill in kinds:
        for above in (False, True):
            some = [t for t in trials if t.outcome.state == state and t is not best and _is_above(t, top) == above]
            axes.plot(
                [place(trial.values[one.key]) for trial in some],
                [top if above else trial.outcome.loss or 0.0 for trial in some],
                linestyle="", marker="^" if above else marker, markersize=7, markerfacecolor=fill,
                markeredgecolor=_OTHER if state == "finished" else _PRUNED, alpha=0.9,
                label=(f"{label}, far above" if above else label) if some else None,
            )  # fmt: skip
    if best is not None and best.outcome.loss is not None:
        x = place(best.values[one.key])
        axes.axvline(x, color=_BEST, linestyle=":", linewidth=1)
        axes.plot(
            x, best.outcome.loss, color=_BEST, marker="*", markersize=16, linestyle="",
            label=f"best: {best.outcome.loss:.4f}",
        )  # fmt: skip
        axes.set_title(f"{one.key} = {best.values[one.key]}", fontsize=10)
    axes.set_xlabel(one.key)
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)


def _places(axes: "Axes", one: Range) -> Any:
    """Set up the x axis for a key and return where a value goes on it."""
    if isinstance(one, Numbers):
        if one.scale == "log":
            axes.set_xscale("log")
        margin, factor = 0.04 * (one.high - one.low), (one.high / max(one.low, 1e-300)) ** 0.04
        ends = (one.low / factor, one.high * factor) if one.scale == "log" else (one.low - margin, one.high + margin)
        axes.set_xlim(*ends)
        return float
    axes.set_xticks(range(len(one.values)), one.values, rotation=20 if len(one.values) > 5 else 0)
    axes.set_xlim(-0.5, len(one.values) - 0.5)
    return lambda value: one.values.index(str(value))


def _top(losses: Sequence[float]) -> float:
    """Return the loss above which trials are drawn at the edge: four times as far from the best as the median."""
    ordered = sorted(losses)
    if len(ordered) < 4:
        return math.inf
    return ordered[0] + max(4 * (ordered[len(ordered) // 2] - ordered[0]), 0.02 * ordered[0])


def _is_above(trial: SweepTrial, top: float) -> bool:
    return trial.outcome.loss is not None and trial.outcome.loss > top


def _share(one: Range, value: Value) -> float | None:
    """Return where a value lies in its range, from 0 to 1; None where that means nothing."""
    if isinstance(one, Choices):
        try:
            numbers = [float(text) for text in one.values]
        except ValueError:
            return None
        if len(numbers) < 3:
            return None
        return sorted(numbers).index(float(value)) / (len(numbers) - 1)
    low, high, at = one.low, one.high, float(value)
    if one.scale == "log":
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def _is_at_edge(one: Range, value: Value) -> bool:
    share = _share(one, value)
    if share is None:
        return False
    limit = 0.0 if isinstance(one, Choices) or one.scale == "int" else _EDGE
    return share <= limit or share >= 1 - limit


def _at_the_edge(one: Range, value: Value) -> str:
    end = "lower" if (_share(one, value) or 0.0) < 0.5 else "upper"
    return f"The best {one.key}, {value}, lies at the {end} end of what was tried; look further that way."
