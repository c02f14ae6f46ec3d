"""The learning-rate range test (Smith 2017, arXiv 1506.01186): one short training with an ever larger rate.

Over the steps of the test the rate rises from 1e-6 to 1e-1, by the same factor each time, on the recipe's own batches
in their own order. As long as the rate is too small the loss hardly moves; then it falls; then it diverges. The test
ends when the smoothed loss exceeds four times its lowest, or is no number.

Smoothed loss: exponential moving average m_k = b m_(k-1) + (1 - b) l_k with b = 0.8, divided by 1 - b^(k+1) so that
it does not begin near zero. Suggested rate: the middle of the eleven steps whose losses, before smoothing (which lags),
fall most steeply on a straight line against the logarithm of the rate; and at most a tenth of the rate at which the
test diverged. Such a test sees a few dozen steps: its answer is a starting point for `haori sweep`, not the best rate.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from haori.core.errors import TrainingError
from haori.core.events import EventSink, Said, discard
from haori.core.records import Record
from haori.core.settings import settings
from haori.core.storage import explain_os_errors, make_stamped_folder, write_text
from haori.tasks.recipe import Recipe

if TYPE_CHECKING:
    from haori.training import Prepared
    from haori.training.loop import Loop

__all__ = ["RangePoint", "RangeTest", "draw_range_test", "judge", "next_point", "range_test"]

_LOW, _HIGH = 1e-6, 1e-1
_STEPS = 80
_SMOOTHING = 0.8
_WINDOW = 5  # steps on either side of the one whose slope is taken
_DIVERGED = 4.0
_FEWEST = 10  # steps before a loss that is no number counts as divergence rather than as bad data


class RangePoint(Record):
    """One step: its learning rate, its loss and the smoothed loss."""

    rate: float
    loss: float
    smoothed: float


class RangeTest(Record):
    """What the test measured and suggests; kept as `range-test.json`."""

    points: tuple[RangePoint, ...]
    diverged_at: float | None = Field(default=None, description="Rate at which the loss diverged, if it did.")
    steepest: float = Field(description="Rate at which the loss fell most steeply.")
    suggested: float
    settled: bool = Field(description="Whether the loss fell enough for the suggestion to mean anything.")


def range_test(recipe: Recipe, *, on_event: EventSink = discard, steps: int = _STEPS) -> tuple[RangeTest, Path]:
    """Run the test in this process; return its result and the folder with `range-test.json` and `range-test.png`.

    Raises:
        HaoriError: The recipe cannot be trained, or fails in its first steps.
    """
    from haori.training import prepare

    prepared = _for_climbing(prepare(recipe), steps)
    folder = make_stamped_folder(settings().home / "sweeps", f"{recipe.name}-range-test")
    try:
        points, diverged_at = _climb(prepared, folder, steps, on_event)
    except BaseException:
        shutil.rmtree(folder)
        raise
    result = judge(points, diverged_at)
    write_text(folder / "range-test.json", result.model_dump_json(indent=1))
    draw_range_test(
        result, folder / "range-test.png", f"{recipe.name}: learning-rate range test", prepared.task.loss_label
    )
    return result, folder


def judge(points: Sequence[RangePoint], diverged_at: float | None) -> RangeTest:
    """Suggest a rate from the smoothed losses.

    Args:
        points: In the order of their rates.
        diverged_at: Rate at which the loss diverged, if it did.
    """
    lowest = min(range(len(points)), key=lambda k: points[k].smoothed)
    slopes = {
        k: _slope(points[k - _WINDOW : k + _WINDOW + 1]) for k in range(_WINDOW, min(len(points) - _WINDOW, lowest + 1))
    }
    steepest = points[min(slopes, key=lambda k: slopes[k])].rate if slopes else points[lowest].rate
    suggested = steepest if diverged_at is None else min(steepest, diverged_at / 10)
    fell = points[lowest].smoothed < 0.95 * points[0].smoothed
    return RangeTest(
        points=tuple(points),
        diverged_at=diverged_at,
        steepest=steepest,
        suggested=float(f"{suggested:.2g}"),
        settled=fell and bool(slopes),
    )


def next_point(points: Sequence[RangePoint], rate: float, loss: float) -> RangePoint:
    """Return the point after `points`, smoothed with them."""
    seen = len(points)
    average = points[-1].smoothed * (1 - _SMOOTHING**seen) if points else 0.0
    average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
    return RangePoint(rate=rate, loss=loss, smoothed=average / (1 - _SMOOTHING ** (seen + 1)))


def _slope(points: Sequence[RangePoint]) -> float:
    """Return the slope of the least-squares line of loss over the logarithm of the rate."""
    x = [math.log(point.rate) for point in points]
    middle = sum(x) / len(x)
    return sum((at - middle) * p.loss for at, p in zip(x, points, strict=True)) / sum((at - middle) ** 2 for at in x)


def draw_range_test(result: RangeTest, path: Path, title: str, label: str) -> None:
    """Draw loss, called `label`, against learning rate as a PNG, with the suggested rate and where it diverged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [point.rate for point in result.points]
    axes.plot(rates, [point.loss for point in result.points], color="#9db4c8", linewidth=1, label="loss, each step")
    smoothed = [point.smoothed for point in result.points]
    axes.plot(rates, smoothed, color="#2f5d8a", linewidth=2, label="loss, smoothed")
    axes.axvline(result.suggested, color="#c4502e", linestyle=":", label=f"suggested: {result.suggested:g}")
    if result.diverged_at is not None:
        axes.axvline(result.diverged_at, color="#6b6b6b", linestyle="--", label=f"diverged: {result.diverged_at:.2g}")
    axes.set_xscale("log")
    bottom, top = min(smoothed), min(max(smoothed), 2 * smoothed[0])
    margin = 0.2 * (top - bottom) or 0.1 * top
    axes.set_ylim(bottom - margin, top + margin)
    axes.set(xlabel="learning rate", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with explain_os_errors(path):
        figure.savefig(path)


def _for_climbing(prepared: "Prepared", steps: int) -> "Prepared":
    """Return the run with the rate of the first step, no schedule, and as many steps as the test has."""
    from haori.training.batches import epoch_steps

    resolved = prepared.recipe
    in_epoch = len(epoch_steps(prepared.train.costs, resolved.training, 0))
    schedule = resolved.schedule.model_copy(update={"kind": "constant", "warmup_ratio": 0.0})
    training = resolved.training.model_copy(
        update={"trackers": (), "max_steps": steps, "epochs": math.ceil(steps / in_epoch) + 1}
    )
    changed = resolved.model_copy(update={"schedule": schedule, "training": training})
    return prepared._replace(recipe=_at_rate(changed, _LOW))


def _at_rate(recipe: Recipe, rate: float) -> Recipe:
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": rate})})


def _climb(
    prepared: "Prepared", folder: Path, steps: int, on_event: EventSink
) -> tuple[list[RangePoint], float | None]:
    """Train with a rising rate; return the points and the rate at which the loss diverged, if it did."""
    from haori.training.session import opened_loop

    points: list[RangePoint] = []
    on_event(Said(text=f"Range test: {steps} steps from learning rate {_LOW:g} to {_HIGH:g}."))
    with opened_loop(prepared, folder) as loop:
        for number in range(steps):
            rate = _LOW * (_HIGH / _LOW) ** (number / (steps - 1))
            loss = _step(loop, prepared.recipe, rate, begun=number >= _FEWEST)
            if loss is None:
                return points, rate
            points.append(next_point(points, rate, loss))
            if points[-1].smoothed > _DIVERGED * min(point.smoothed for point in points):
                return points, rate
            if (number + 1) % 10 == 0:
                text = f"  step {number + 1}: learning rate {rate:.1e}, loss {points[-1].smoothed:.3f}"
                on_event(Said(text=text))
    return points, None


def _step(loop: "Loop", recipe: Recipe, rate: float, *, begun: bool) -> float | None:
    """Do the next optimizer step at `rate`; return its loss before the step, None if it is no number."""
    loop.recipe = _at_rate(recipe, rate)
    position = loop.position
    steps = loop.plan(position.epoch)
    try:
        loop.step(steps[position.step_in_epoch], last_of_epoch=position.step_in_epoch + 1 == len(steps))
    except TrainingError:
        if not begun:
            raise
        return None
    line: dict[str, Any] = loop.measurements.series("train")[-1]
    return float(line["loss"])
